"""What an edge runtime does for a device: run the bundle's graphs."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from edge_client.bundle import Bundle, RuntimeName
from edge_client.tokens import Batch
from fedtt.errors import ConfigError, RuntimeFailure
from fedtt.layout import Theta
from fedtt.manifest import DepthGraphs, Manifest

__all__ = [
    "Hidden",
    "Runtime",
    "Runtimes",
    "Scorer",
    "checked_threads",
    "hidden_shape",
    "logits_shape",
    "outputs_of",
    "step_outputs",
]

_MOST_THREADS = 1024

Hidden = NDArray[np.float32]  #: what enters the first block that trains, (B, S, W), W as the bundle says


class Scorer(Protocol):
    """What judging needs of a runtime; raises RuntimeFailure where the graph cannot be loaded or run, and
    UnavailableError where its files cannot be read now.
    """

    @property
    def rows(self) -> int | None:
        """Most rows of a batch; None for any number."""
        ...

    def logits(self, theta: Theta, batch: Batch) -> NDArray[np.float32]:
        """theta (P,) -> (B, C) for classification, (B, S, V) for causal-lm."""
        ...


class Runtime(Scorer, Protocol):
    """The graphs of one bundle, loaded when first used; may be called from several threads at once.

    All raise what `Scorer` does.
    """

    @property
    def name(self) -> RuntimeName:
        """Whose graphs it runs."""
        ...

    @property
    def depths(self) -> tuple[int, ...]:
        """How many of the last blocks can be trained over what lies below them, rising."""
        ...

    def gradient(self, theta: Theta, batch: Batch) -> tuple[float, Theta]:
        """theta (P,) -> loss and its gradient (P,)."""
        ...

    def private_gradient(
        self, theta: Theta, batch: Batch, live: NDArray[np.float32], clip: float
    ) -> tuple[float, Theta]:
        """theta (P,), live (P,) of 1 and 0 -> loss and the mean of the examples' own gradients where live is
        1, each scaled down to the norm `clip`, (P,); RuntimeFailure where the bundle has no such graph.
        """
        ...

    def prefix(self, theta: Theta, batch: Batch, depth: int) -> Hidden:
        """theta (P,) -> what enters the last `depth` blocks; it reads the factors below them alone."""
        ...

    def gradient_above(self, theta: Theta, hidden: Hidden, batch: Batch, depth: int) -> tuple[float, Theta]:
        """theta (P,), hidden (B, S, W) in place of the ids -> as `gradient`, zero for what lies below.

        What hidden holds where the mask is 0 does not matter, as long as it is finite.
        """
        ...

    def release(self) -> None:
        """Free the graphs that are loaded; one that runs, when it has run. Each is loaded again when used."""
        ...


class Runtimes:
    """The runtime of the bundle that a process opened last: devices that share a base share its memory.

    Another bundle's takes its place, and goes once nobody trains on it.
    """

    def __init__(self, load: Callable[[Bundle], Runtime], name: RuntimeName = "onnxruntime") -> None:
        self.name, self._load = name, load
        self._newest: tuple[str, Runtime] | None = None
        self._guard = threading.Lock()

    def open(self, bundle: Bundle) -> Runtime:
        with self._guard:
            if self._newest is None or self._newest[0] != bundle.digest:
                self._newest = None  # its memory goes before the next is loaded
                self._newest = bundle.digest, self._load(bundle)
            return self._newest[1]


def checked_threads(threads: int) -> int:
    """A number of threads that every runtime takes as it is; raises ConfigError for any other."""
    if not 1 <= threads <= _MOST_THREADS:
        raise ConfigError("threads", threads, f"1..{_MOST_THREADS}")
    return threads


def outputs_of(
    name: str, found: Sequence[NDArray[Any]], *shapes: tuple[int | None, ...]
) -> list[NDArray[np.float32]]:
    """What graph `name` returned, if it is float32 of these shapes (None: any size); else RuntimeFailure."""
    fits = len(found) == len(shapes) and all(
        array.dtype == np.float32
        and array.ndim == len(shape)
        and all(want in (None, have) for have, want in zip(array.shape, shape, strict=True))
        for array, shape in zip(found, shapes, strict=True)
    )
    if not fits:
        got = ", ".join(f"{array.dtype} {array.shape}" for array in found) or "nothing"
        wanted = ", ".join(f"float32 {shape}" for shape in shapes)
        raise RuntimeFailure(f"{name} returned {got[:200]} in place of {wanted}: export the bundle again")
    return list(found)


def step_outputs(name: str, found: Sequence[NDArray[Any]], size: int) -> tuple[float, Theta]:
    """Loss () and gradient (P,), if that is what a step returned; else RuntimeFailure."""
    loss, gradient = outputs_of(name, found, (), (size,))
    return float(loss), gradient


def logits_shape(manifest: Manifest, batch: Batch) -> tuple[int | None, ...]:
    """(B, C) of a classifier, (B, S, any) else."""
    rows, tokens = batch.ids.shape
    return (rows, len(manifest.labels)) if manifest.adapter.head else (rows, tokens, None)


def hidden_shape(manifest: Manifest, cut: DepthGraphs, batch: Batch) -> tuple[int, int, int]:
    """(B, S, W) of what a prefix returns."""
    return (*batch.ids.shape, cut.states * manifest.adapter.hidden)
