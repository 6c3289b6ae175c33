"""The bundle's graphs in plain ONNX Runtime (no training build): the step is an ordinary graph."""

from __future__ import annotations

import re
import threading
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edge_client.bundle import Bundle, RuntimeName, check_there, reading
from edge_client.runtime import (
    Hidden,
    Runtimes,
    checked_threads,
    hidden_shape,
    logits_shape,
    outputs_of,
    step_outputs,
)
from edge_client.tokens import Batch
from fedtt.errors import RuntimeFailure
from fedtt.graph_file import check_graph, check_size
from fedtt.layout import Theta

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

__all__ = ["OnnxRuntime", "onnx_runtimes"]


class OnnxRuntime:
    """A session for each graph, loaded when first used, with `threads` threads."""

    name: RuntimeName = "onnxruntime"
    rows: int | None = None

    def __init__(self, bundle: Bundle, *, threads: int = 1) -> None:
        self._graphs = bundle.graphs("onnxruntime")
        self._cuts = {cut.depth: cut for cut in self._graphs.depths}
        self._bundle, self._threads = bundle, checked_threads(threads)
        self._layout = bundle.manifest.adapter.layout
        self._sessions: dict[str, InferenceSession] = {}
        self._guard = threading.Lock()

    @property
    def depths(self) -> tuple[int, ...]:
        return tuple(self._cuts)

    def gradient(self, theta: Theta, batch: Batch) -> tuple[float, Theta]:
        return self._step(self._graphs.step, _inputs(theta, batch) | _labels(batch))

    def private_gradient(
        self, theta: Theta, batch: Batch, live: NDArray[np.float32], clip: float
    ) -> tuple[float, Theta]:
        if (name := self._graphs.private) is None:
            raise RuntimeFailure("the bundle has no step that clips gradients: export it with --dp")
        inputs = _inputs(theta, batch) | _labels(batch)
        return self._step(name, inputs | {"live": live, "clip": np.array(clip, np.float32)})

    def logits(self, theta: Theta, batch: Batch) -> NDArray[np.float32]:
        name = self._graphs.eval
        found = self._run(name, ["logits"], _inputs(theta, batch))
        return outputs_of(name, found, logits_shape(self._bundle.manifest, batch))[0]

    def prefix(self, theta: Theta, batch: Batch, depth: int) -> Hidden:
        name = self._cuts[depth].prefix
        found = self._run(name, ["hidden"], _inputs(theta, batch))
        return outputs_of(name, found, hidden_shape(self._bundle.manifest, self._cuts[depth], batch))[0]

    def gradient_above(self, theta: Theta, hidden: Hidden, batch: Batch, depth: int) -> tuple[float, Theta]:
        inputs: dict[str, NDArray[Any]] = {"theta": theta, "hidden": hidden, "mask": batch.mask}
        return self._step(self._cuts[depth].step, inputs | (_labels(batch) or {"ids": batch.ids}))

    def release(self) -> None:
        with self._guard:
            self._sessions.clear()

    def _step(self, name: str, inputs: dict[str, NDArray[Any]]) -> tuple[float, Theta]:
        return step_outputs(name, self._run(name, ["loss", "grad"], inputs), self._layout.size)

    def _run(self, name: str, outputs: list[str], inputs: dict[str, NDArray[Any]]) -> list[NDArray[Any]]:
        self._layout.check(inputs["theta"])
        session = self._session(name)
        try:
            found: list[NDArray[Any]] = session.run(outputs, inputs)
        except Exception as error:  # its errors share no base of their own
            shape = "x".join(map(str, inputs["mask"].shape))
            raise RuntimeFailure(f"{name} did not run on a batch of {shape} tokens: {_line(error)}") from None
        return found

    def _session(self, name: str) -> InferenceSession:
        with self._guard:
            if name not in self._sessions:
                _check_installed(self._bundle.manifest.requires.get("onnxruntime", "0"))
                path = self._bundle.path(name)
                with reading(path):
                    check_size(path.stat().st_size, name)
                    check_graph(path.read_bytes(), name, self._graphs.weights)
                integers = self._bundle.manifest.model.products != "fp32"
                try:
                    session = _load(path, self._threads, self._layout.size, integers=integers)
                except RuntimeFailure:
                    check_there(path, *map(self._bundle.path, self._graphs.weights))
                    raise
                self._sessions[name] = session
            return self._sessions[name]


def _inputs(theta: Theta, batch: Batch) -> dict[str, NDArray[Any]]:
    return {"theta": theta, "ids": batch.ids, "mask": batch.mask}


def _labels(batch: Batch) -> dict[str, NDArray[Any]]:
    return {} if batch.labels is None else {"labels": batch.labels}


def _check_installed(required: str) -> None:
    """Raise RuntimeFailure where ONNX Runtime is missing or older than a bundle requires."""
    try:
        from onnxruntime import __version__ as installed
    except ImportError:
        raise _missing() from None
    if _numbers(installed) < _numbers(required):
        raise RuntimeFailure(
            f"the bundle needs onnxruntime {required} or newer, {installed} is installed: "
            f"pip install 'onnxruntime>={required}'"
        )


def _missing() -> RuntimeFailure:
    return RuntimeFailure("onnxruntime is not installed: pip install 'fedtt[edge]'")


def _numbers(version: str) -> tuple[int, ...]:
    """1.20 -> (1, 20, 0): release numbers that compare."""
    found = [int(number) for number in re.findall(r"\d+", version)]
    return tuple([*found, 0, 0, 0][:3])


def _load(path: Path, threads: int, size: int, *, integers: bool) -> InferenceSession:
    """integers: whether the frozen matrices are multiplied as they are stored."""
    import onnxruntime  # slow to import, and not needed before a graph is

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3  # errors reach us as exceptions
    # Copies of the frozen weights, and buffers planned for each shape of batch, buy 5-10 % of speed with most
    # of the memory: MiniLM at 8x64 tokens peaks at 318 MB with them and at 191 MB, 81 of it mapped, without.
    # Copies of int8 matrices are a quarter as large.
    options.enable_mem_pattern = False
    if not integers:
        options.add_session_config_entry("session.disable_prepacking", "1")
    without = [] if integers else ["ConstantFolding"]
    try:
        session = onnxruntime.InferenceSession(
            str(path), options, providers=["CPUExecutionProvider"], disabled_optimizers=without
        )
    except Exception as error:  # its errors share no base of their own
        raise RuntimeFailure(f"{path.name} cannot be loaded: {_line(error)}") from None
    found = {node.name: node.shape for node in session.get_inputs()}.get("theta")
    if found != [size]:
        raise RuntimeFailure(f"{path.name} takes a theta of shape {found}, the layout has {size} numbers")
    return session


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def onnx_runtimes(threads: int = 1) -> Runtimes:
    """Runtimes that load bundles with ONNX Runtime, which is not imported yet: that takes a while.

    Raises RuntimeFailure where it is not installed, ConfigError for threads outside 1..1024.
    """
    if find_spec("onnxruntime") is None:
        raise _missing()
    return Runtimes(partial(OnnxRuntime, threads=checked_threads(threads)), "onnxruntime")
