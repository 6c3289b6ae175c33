"""What training imports, imported beforehand: it holds up all threads of a process, whichever imports it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fedtt.errors import RuntimeFailure

if TYPE_CHECKING:
    from edge_client.bundle import RuntimeName

__all__ = ["prepare"]


def prepare(runtime: RuntimeName = "onnxruntime") -> None:
    """Load the libraries of training; for an app to call where it starts, before its event loop runs.

    A device that finds them unloaded loads them on a thread when it first trains, which holds up the app's
    loop all the same. Raises RuntimeFailure where one of them is missing, or ExecuTorch's library another.
    """
    if runtime == "executorch":
        from edge_client.executorch_runtime import load_library

        load_library()
    libraries = ("onnxruntime",) if runtime == "onnxruntime" else ()
    for name in ("numpy.random", *libraries, "tokenizers"):
        try:
            __import__(name)
        except ImportError as error:
            raise RuntimeFailure(f"{name} cannot be loaded ({error}): pip install 'fedtt[edge]'") from None
