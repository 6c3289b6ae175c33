"""The C++ side of the ExecuTorch runtime: `shim.cpp`, its header, and what builds them into a library."""
