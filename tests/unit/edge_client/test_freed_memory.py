from __future__ import annotations

import ctypes
import subprocess
import sys

import pytest

_PROGRAM = """
import ctypes, sys, threading
from edge_client.freed_memory import give_freed_memory_back

class Info(ctypes.Structure):  # mallinfo2
    _names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    _fields_ = [(name, ctypes.c_size_t) for name in _names.split()]

libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]
libc.mallinfo2.restype = Info
if sys.argv[1] == "given back":
    give_freed_memory_back()
libc.free(libc.malloc(16 << 20))
before, heap = libc.mallinfo2().hblkhd, []
block = libc.malloc(8 << 20)
thread = threading.Thread(target=lambda: heap.append(libc.malloc(1000)))
thread.start()
thread.join()
other = abs(heap[0] - libc.malloc(1000)) > 1 << 30
print(libc.mallinfo2().hblkhd - before >= 8 << 20, other)
"""


@pytest.mark.skipif(
    not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="the C library is not glibc from 2.33"
)
@pytest.mark.parametrize(("how", "found"), [("kept", "False True"), ("given back", "True False")])
def test_large_blocks_are_mappings_and_threads_share_a_heap(how: str, found: str) -> None:
    """By itself glibc takes a block from a heap once a larger one was freed, and threads have one each."""
    command = (sys.executable, "-c", _PROGRAM, how)
    ran = subprocess.run(command, capture_output=True, text=True, check=True)
    assert ran.stdout.split() == found.split()
