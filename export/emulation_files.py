"""The directory beside a bundle that holds the graphs of an emulator: what is in it, and how it is run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
from msgspec import Struct

if TYPE_CHECKING:
    from onnxruntime import InferenceSession, SessionOptions

__all__ = [
    "DEVICES",
    "PREFIX",
    "STAMP",
    "EmulationFiles",
    "emulation_directory",
    "open_emulation",
    "open_session",
]

DEVICES, PREFIX = "devices.onnx", "prefix.onnx"
STAMP = "emulation.json"


class EmulationFiles(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The contents of `emulation.json`."""

    format: int = 1  #: of the graphs' inputs and outputs
    bundle: str  #: digest of the bundle they were compiled for
    cut: int  #: the block that the devices' step begins at; below it is the prefix


def emulation_directory(bundle: Path) -> Path:
    bundle = bundle.absolute()  # "." has no name
    return bundle.with_name(f"{bundle.name}.emulation")


def open_emulation(directory: Path, bundle: str) -> EmulationFiles | None:
    """What a directory holds; None unless it was compiled, by this program, for the bundle of this digest."""
    try:
        found = msgspec.json.decode((directory / STAMP).read_bytes(), type=EmulationFiles)
    except (OSError, msgspec.DecodeError):
        return None
    return found if found == EmulationFiles(bundle=bundle, cut=found.cut) else None


def open_session(graph: Path, bundle: Path, options: SessionOptions | None = None) -> InferenceSession:
    """A session of a graph whose weights lie in a bundle's directory."""
    import onnxruntime  # slow to import

    options = options or onnxruntime.SessionOptions()
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(bundle))
    return onnxruntime.InferenceSession(graph.read_bytes(), options, providers=["CPUExecutionProvider"])
