"""The words every method speaks in."""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import TypeVar

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from fedtt.layout import Theta

__all__ = ["Batch", "Folded", "Gradient", "LocalResult", "Moved", "Steps", "drive"]

Batch = TypeVar("Batch")
Gradient = Callable[[Theta, Batch], tuple[float, Theta]]  #: (theta (P,), batch) -> (loss, dloss/dtheta (P,))


class LocalResult(Struct, frozen=True, kw_only=True):
    """What local training yields."""

    delta: NDArray[np.float32]  #: change of the live factors, (live.size,)
    steps: int
    loss_first: float
    loss_last: float


#: A local training that asks for its gradients: it yields (theta (P,), batch), is sent (loss, gradient (P,))
#: and returns its result. So one method file serves a device that runs a graph on its own and an emulator
#: that answers a thousand devices in one pass. What is yielded may be overwritten after the answer.
Steps = Generator[tuple[Theta, Batch], tuple[float, Theta], LocalResult]


class Folded(Struct, frozen=True, kw_only=True):
    """What a round's deltas come to."""

    delta: NDArray[np.float64]  #: of the numbers that the method folds, (space.size,)
    report: dict[str, float] = {}  #: what the method measured, by name with its unit


class Moved(Struct, frozen=True, kw_only=True):
    """The next version, before it is rounded to what is published."""

    theta: NDArray[np.float64]  #: (P,)
    report: dict[str, float] = {}  #: what the method measured on the way


def drive(steps: Steps[Batch], gradient: Gradient[Batch]) -> LocalResult:
    """Run a local training to its end, one gradient at a time."""
    try:
        theta, batch = next(steps)
        while True:
            theta, batch = steps.send(gradient(theta, batch))
    except StopIteration as end:
        result: LocalResult = end.value
        return result
