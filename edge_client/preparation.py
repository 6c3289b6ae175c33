"""What training imports, imported beforehand: it holds up all threads of a process, whichever imports it."""

from __future__ import annotations

from contextlib import suppress

__all__ = ["prepare"]


def prepare() -> None:
    """Import the libraries of training; for an app to call where it starts, before its event loop runs.

    A device that finds them missing imports them on a thread when it first trains, which holds up the app's
    loop all the same, ONNX Runtime alone for some 20 ms of a server's core and several times that of a
    board's. They take 44 MB of memory. What is not installed is left out.
    """
    for name in ("numpy.random", "onnxruntime", "tokenizers"):
        with suppress(ImportError):
            __import__(name)
