"""The bundle's programs in ExecuTorch, through a small shared library of ours, without torch."""

from __future__ import annotations

import ctypes
import importlib.util
import mmap
import os
import sys
import threading
from functools import partial
from pathlib import Path
from typing import Any

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
from fedtt.graph_file import check_size
from fedtt.layout import Theta
from fedtt.program_file import check_program
from fedtt.weights_file import stored_data

__all__ = ["LIBRARY_VARIABLE", "ExecutorchRuntime", "executorch_runtimes", "load_library"]

LIBRARY_VARIABLE = "FEDTT_EXECUTORCH_LIBRARY"  #: names the shared library where it lies elsewhere

_ABI = 1  #: FEDTT_EXECUTORCH_ABI in executorch/fedtt_executorch.h
_NAME = "libfedtt_executorch.dylib" if sys.platform == "darwin" else "libfedtt_executorch.so"
_TYPES = {3: np.int32, 4: np.int64, 6: np.float32}  # ExecuTorch's numbers
_NUMBERS = {np.dtype(kind): number for number, kind in _TYPES.items()}
_ERROR_BYTES = 400

_opened: dict[Path, tuple[ctypes.CDLL, int]] = {}  # by path: the library, and how many threads it runs on
_opening = threading.Lock()


class _Tensor(ctypes.Structure):
    """fedtt_tensor in executorch/fedtt_executorch.h."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("type", ctypes.c_int32),
        ("dimensions", ctypes.c_int32),
        ("sizes", ctypes.c_int32 * 8),
    )


class ExecutorchRuntime:
    """Programs for step and eval, each loaded when first used; those of a process share its `threads`."""

    def __init__(self, bundle: Bundle, *, threads: int = 1, library: Path | None = None) -> None:
        self._graphs = bundle.graphs("executorch")
        self._cuts = {cut.depth: cut for cut in self._graphs.depths}
        self._bundle, self._threads, self._library = bundle, checked_threads(threads), library
        self._layout = bundle.manifest.adapter.layout
        self._programs: dict[str, _Program] = {}
        self._are_weights_sound = False
        self._guard = threading.Lock()  # a program is one caller's at a time, and two at once gain nothing

    @property
    def name(self) -> RuntimeName:
        return "executorch"

    @property
    def depths(self) -> tuple[int, ...]:
        return tuple(self._cuts)

    @property
    def rows(self) -> int | None:
        """Those that memory was planned for."""
        return self._graphs.rows

    def gradient(self, theta: Theta, batch: Batch) -> tuple[float, Theta]:
        labels = () if batch.labels is None else (batch.labels,)
        return self._step(self._graphs.step, theta, batch.ids, batch.mask, *labels)

    def private_gradient(
        self, theta: Theta, batch: Batch, live: NDArray[np.float32], clip: float
    ) -> tuple[float, Theta]:
        if (name := self._graphs.private) is None:
            raise RuntimeFailure("the bundle has no step that clips gradients: export it with --dp")
        labels = () if batch.labels is None else (batch.labels,)
        bound = np.array(clip, np.float32)
        return self._step(name, theta, batch.ids, batch.mask, *labels, live, bound)

    def logits(self, theta: Theta, batch: Batch) -> NDArray[np.float32]:
        name = self._graphs.eval
        found = self._run(name, theta, batch.ids, batch.mask)
        return outputs_of(name, found, logits_shape(self._bundle.manifest, batch))[0]

    def prefix(self, theta: Theta, batch: Batch, depth: int) -> Hidden:
        name = self._cuts[depth].prefix
        found = self._run(name, theta, batch.ids, batch.mask)
        return outputs_of(name, found, hidden_shape(self._bundle.manifest, self._cuts[depth], batch))[0]

    def gradient_above(self, theta: Theta, hidden: Hidden, batch: Batch, depth: int) -> tuple[float, Theta]:
        last = batch.ids if batch.labels is None else batch.labels
        return self._step(self._cuts[depth].step, theta, hidden, batch.mask, last)

    def release(self) -> None:
        with self._guard:
            self._programs.clear()

    def _step(self, name: str, theta: Theta, *batch: NDArray[Any]) -> tuple[float, Theta]:
        return step_outputs(name, self._run(name, theta, *batch), self._layout.size)

    def _run(self, name: str, theta: Theta, *batch: NDArray[Any]) -> list[NDArray[Any]]:
        self._layout.check(theta)
        self._check(name, len(batch[0]))
        with self._guard:
            if name not in self._programs:
                self._programs[name] = self._load(name)
            try:
                return self._programs[name].run(theta, *batch)
            except RuntimeFailure as error:
                shape = "x".join(map(str, batch[0].shape[:2]))
                raise RuntimeFailure(f"{name} did not run on a batch of {shape} tokens: {error}") from None

    def _load(self, name: str) -> _Program:
        library = _open(self._library or _find(), self._threads)
        wanted, found = self._bundle.manifest.requires.get("executorch", "of no release"), _version(library)
        if wanted != found:
            raise RuntimeFailure(
                f"the bundle needs ExecuTorch {wanted}, the library here is of {found}: "
                f"install the fedtt-executorch wheel made for {wanted}, or export again for {found}"
            )
        if len(self._graphs.weights) != 1:
            raise RuntimeFailure(f"{name} needs one file of weights, the bundle has {self._graphs.weights}")
        path, weights = self._bundle.path(name), self._bundle.path(self._graphs.weights[0])
        with reading(path):
            check_size(path.stat().st_size, name)
            check_program(path.read_bytes(), name)
        if not self._are_weights_sound:
            _check_weights(weights)
            self._are_weights_sound = True
        try:
            return _Program(library, path, weights)
        except RuntimeFailure:
            check_there(path, weights)
            raise

    def _check(self, name: str, found: int) -> None:
        """Raise RuntimeFailure for more rows than memory was planned for."""
        if self.rows is not None and found > self.rows:
            raise RuntimeFailure(f"{name} takes at most {self.rows} rows, the batch has {found}")


def _check_weights(path: Path) -> None:
    """Raise BundleError where a file of weights lies; reads the pages of its tables alone."""
    with reading(path), path.open("rb") as file:
        is_empty = os.fstat(file.fileno()).st_size == 0  # which cannot be mapped
        data = b"" if is_empty else memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    stored_data(data, path.name)


class _Program:
    """One loaded program; the library frees it with this object."""

    def __init__(self, library: ctypes.CDLL, path: Path, weights: Path) -> None:
        self._library, self._handle = library, None
        error = ctypes.create_string_buffer(_ERROR_BYTES)
        self._handle = library.fedtt_load(os.fsencode(path), os.fsencode(weights), error, _ERROR_BYTES)
        if not self._handle:
            raise RuntimeFailure(
                f"{path.name} {_text(error)}; does {weights.name} belong to it? download the bundle again"
            )

    def __del__(self) -> None:
        if self._handle:
            self._library.fedtt_free(self._handle)

    def run(self, *inputs: NDArray[Any]) -> list[NDArray[Any]]:
        arrays = [np.asarray(array, order="C") for array in inputs]
        tensors = (_Tensor * len(arrays))(*map(_tensor, arrays))
        error = ctypes.create_string_buffer(_ERROR_BYTES)
        if self._library.fedtt_run(self._handle, tensors, len(arrays), error, _ERROR_BYTES):
            raise RuntimeFailure(_text(error))
        return [self._output(i) for i in range(self._library.fedtt_output_count(self._handle))]

    def _output(self, index: int) -> NDArray[Any]:
        """A copy: the program's own memory is written again when it next runs."""
        found = _Tensor()
        if self._library.fedtt_output(self._handle, index, ctypes.byref(found)):
            raise RuntimeFailure(f"output {index} is no tensor")
        if found.type not in _TYPES:
            raise RuntimeFailure(f"output {index} is of type {found.type}, none of {sorted(_TYPES)}")
        shape = tuple(found.sizes[: found.dimensions])
        out = np.empty(shape, _TYPES[found.type])
        ctypes.memmove(out.ctypes.data, found.data, out.nbytes)
        return out


def _tensor(array: NDArray[Any]) -> _Tensor:
    sizes = (ctypes.c_int32 * 8)(*array.shape)
    return _Tensor(array.ctypes.data, _NUMBERS[array.dtype], array.ndim, sizes)


def _text(error: ctypes.Array[ctypes.c_char]) -> str:
    return " ".join(error.value.decode(errors="replace").split())


def _version(library: ctypes.CDLL) -> str:
    found: bytes = library.fedtt_executorch_version()
    return found.decode()


def _find() -> Path:
    """The library that the environment names, else that of the wheel, else one built here."""
    if named := os.environ.get(LIBRARY_VARIABLE):
        return Path(named)
    found = importlib.util.find_spec("fedtt_executorch")
    if found is None or found.origin is None:
        return Path(__file__).parent / "executorch" / "build" / _NAME
    return Path(found.origin).parent / _NAME


def load_library() -> None:
    """Have it in the process, where it stays; RuntimeFailure where it is missing or another."""
    _loaded(_find())


def _open(path: Path, threads: int) -> ctypes.CDLL:
    """The library, loaded once a process; RuntimeFailure where it runs on another number of threads.

    It has one pool of threads, which cannot be replaced while a program runs on it: whoever is first sets it.
    """
    with _opening:
        key = path.resolve()
        if key not in _opened:
            library = _loaded(path)
            library.fedtt_set_threads(threads)
            _opened[key] = library, threads
        library, had = _opened[key]
    if threads != had:
        raise RuntimeFailure(
            f"ExecuTorch already runs with threads={had} in this process, {threads} cannot be had beside it: "
            f"ask for {had}, or start another process"
        )
    return library


def _loaded(path: Path) -> ctypes.CDLL:
    """The library with its functions declared; RuntimeFailure where it is missing or another."""
    remedy = (
        "install the fedtt-executorch wheel, or build it: python -m edge_client.executorch.build "
        f"(docs/executorch.md), or name it in {LIBRARY_VARIABLE}"
    )
    if not path.is_file():
        raise RuntimeFailure(f"the ExecuTorch library is not here ({path.name}): {remedy}")
    try:
        library = ctypes.CDLL(str(path))
        abi = library.fedtt_abi()
    except (OSError, AttributeError) as error:
        raise RuntimeFailure(f"{path} is not an ExecuTorch library of fedtt ({error}): {remedy}") from None
    if abi != _ABI:
        raise RuntimeFailure(f"{path} speaks ABI {abi}, this program {_ABI}: {remedy}")
    pointer, text, size = ctypes.c_void_p, ctypes.c_char_p, ctypes.c_size_t
    library.fedtt_executorch_version.restype = text
    library.fedtt_load.restype, library.fedtt_load.argtypes = pointer, [text, text, text, size]
    library.fedtt_free.restype, library.fedtt_free.argtypes = None, [pointer]
    library.fedtt_output_count.argtypes = [pointer]
    library.fedtt_run.argtypes = [pointer, ctypes.POINTER(_Tensor), ctypes.c_int32, text, size]
    library.fedtt_output.argtypes = [pointer, ctypes.c_int32, ctypes.POINTER(_Tensor)]
    library.fedtt_set_threads.restype, library.fedtt_set_threads.argtypes = None, [ctypes.c_uint32]
    return library


def executorch_runtimes(threads: int = 1) -> Runtimes:
    """Runtimes that load bundles with ExecuTorch.

    Raises RuntimeFailure where its library is missing or another, ConfigError for threads outside 1..1024.
    """
    load = partial(ExecutorchRuntime, threads=checked_threads(threads))
    load_library()
    return Runtimes(load, "executorch")
