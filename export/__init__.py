"""A tool: from a transformers model to a bundle that devices can train, and from a version back to torch."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .compile import export_bundle
    from .load import load_version
    from .request import ExportRequest
    from .verify import verify_bundle

__all__ = ["ExportRequest", "export_bundle", "load_version", "verify_bundle"]

_HOMES = {
    "ExportRequest": "request",
    "export_bundle": "compile",
    "load_version": "load",
    "verify_bundle": "verify",
}


def __getattr__(name: str) -> Any:
    """Import on first use, so that the command line starts without torch."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)
