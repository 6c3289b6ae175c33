"""What training imports, imported beforehand: it holds up all threads of a process, whichever imports it."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING

from fedtt.errors import RuntimeFailure

if TYPE_CHECKING:
    from edge_client.bundle import RuntimeName

__all__ = ["prepare"]


def prepare(runtime: RuntimeName = "onnxruntime") -> None:
    """Load the libraries of training; for an app to call where it starts, before its event loop runs.

    A device that finds them missing loads them on a thread when it first trains, which holds up the app's
    loop all the same. What is not installed is left out.
    """
    if runtime == "executorch":
        from edge_client.executorch_runtime import load_library

        with suppress(RuntimeFailure):
            load_library()
    libraries = ("onnxruntime",) if runtime == "onnxruntime" else ()
    for name in ("numpy.random", *libraries, "tokenizers"):
        with suppress(ImportError):
            __import__(name)
