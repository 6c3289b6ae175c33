"""What glibc does with memory that a process has freed, where it is the C library."""

from __future__ import annotations

import ctypes
import sys

__all__ = ["give_freed_memory_back"]

_ARENA_MAX, _MMAP_THRESHOLD = -8, -3  # M_ARENA_MAX and M_MMAP_THRESHOLD in malloc.h
_LARGE_BYTES = 128 * 1024  #: where glibc begins


def give_freed_memory_back() -> None:
    """Have threads of the process share one heap, and large blocks go to the system when freed.

    Else each thread keeps what it freed from the others, and blocks up to the largest freed so far are kept.
    For programs that own their process: this concerns all that is in it.
    """
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    mallopt = getattr(libc, "mallopt", None)
    if mallopt is not None:
        mallopt(_ARENA_MAX, 1)
        mallopt(_MMAP_THRESHOLD, _LARGE_BYTES)
