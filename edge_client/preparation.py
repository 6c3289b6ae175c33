"""What training imports, imported beforehand: it holds up all threads of a process, whichever imports it."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from edge_client.bundle import RuntimeName

__all__ = ["prepare"]


def prepare(runtime: RuntimeName = "onnxruntime") -> None:
    """Import the libraries of training; for an app to call where it starts, before its event loop runs.

    A device that finds them missing imports them on a thread when it first trains, which holds up the app's
    loop all the same. What is not installed is left out.
    """
    libraries = ("onnxruntime",) if runtime == "onnxruntime" else ()
    for name in ("numpy.random", *libraries, "tokenizers"):
        with suppress(ImportError):
            __import__(name)
