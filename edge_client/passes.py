"""Which rows go through the base together.

Rows are independent there, so those of like length share a pass, and hardly any padding is computed: of one
batch on a device, of all devices' batches in an emulator. A batch may lie in several passes: its gradients
add up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edge_client.tokens import Batch
from fedtt.errors import ConfigError
from fedtt.layout import Theta

__all__ = [
    "PASSES",
    "Pass",
    "PassLimits",
    "in_passes",
    "padded_tokens",
    "passes_in_order",
    "plan_passes",
]

Rows = NDArray[np.intp]


@dataclass(frozen=True, kw_only=True)
class PassLimits:
    """What a pass may hold; the memory it takes follows from that alone."""

    tokens: int = 1024  #: padding counted; one row of more goes alone
    rows: int | None = None  #: None for any number
    overhead_tokens: int = 32  #: for which another pass would have to save padding, to be worth it

    def __post_init__(self) -> None:
        if self.tokens < 1:
            raise ConfigError("passes.tokens", self.tokens, "a whole number from 1")
        if self.rows is not None and self.rows < 1:
            raise ConfigError("passes.rows", self.rows, "a whole number from 1")
        if self.overhead_tokens < 0:
            raise ConfigError("passes.overhead_tokens", self.overhead_tokens, "a whole number from 0")


PASSES = PassLimits(tokens=2048)  #: of a device: MiniLM's step over 16 x 128 tokens peaks near 1 GB


@dataclass(frozen=True, eq=False)
class Pass:
    """Numbers of rows, rising, and the tokens that each is padded to."""

    rows: Rows
    width: int


def plan_passes(lengths: NDArray[np.intp], limits: PassLimits, *, least: int = 1) -> list[Pass]:
    """Cut the rows, ordered by length (n,), where the passes cost least together.

    A pass costs its tokens with padding and an overhead. No row is padded to fewer than `least` tokens.
    The cuts between lengths are the best there are for passes of any size (dynamic programming); what
    lies between two cuts is dealt into equal passes within the limit.
    """
    if not len(lengths):
        return []
    widths = np.maximum(lengths, least)
    order = np.argsort(widths, kind="stable")
    levels, counts = np.unique(widths, return_counts=True)
    ends = np.concatenate([[0], np.cumsum(counts)])
    passes: list[Pass] = []
    for low, high in _best_cuts(levels.tolist(), ends.tolist(), limits):
        rows = order[ends[low] : ends[high]]
        parts = _parts(len(rows), int(levels[high - 1]), limits)
        passes += [Pass(np.sort(part), int(widths[part].max())) for part in np.array_split(rows, parts)]
    return passes


def in_passes(
    batch: Batch,
    limits: PassLimits,
    gradient: Callable[[Batch], tuple[float, Theta]],
    *,
    least: int,
    by_tokens: bool,
) -> tuple[float, Theta]:
    """What `gradient` gives of a batch, mean loss and mean gradient (P,), by passes of like length.

    least: tokens that a row is padded to. by_tokens: whether the means are over tokens that follow others, as
    for causal-lm, or over rows.
    """
    lengths = batch.mask.sum(1)
    counts = np.maximum(lengths - 1, 0) if by_tokens else np.ones(len(lengths), np.int64)
    passes = plan_passes(lengths, limits, least=least)
    if len(passes) == 1:
        return gradient(batch)
    total, found = max(1, int(counts.sum())), list[tuple[float, float, Theta]]()
    for part in passes:
        labels = None if batch.labels is None else batch.labels[part.rows]
        cut = (part.rows, slice(part.width))
        share = int(counts[part.rows].sum()) / total
        found.append((share, *gradient(Batch(ids=batch.ids[cut], mask=batch.mask[cut], labels=labels))))
    mean: Theta = np.sum([np.float32(share) * own for share, _, own in found], axis=0)
    return sum(share * loss for share, loss, _ in found), mean


def passes_in_order(lengths: Sequence[int], limits: PassLimits, *, least: int = 1) -> Iterator[slice]:
    """Rows as they come, by their lengths, as many together as a pass may hold."""
    start, width = 0, least
    for row, length in enumerate(lengths):
        count, wider = row + 1 - start, max(width, length)
        full = count * wider > limits.tokens or (limits.rows is not None and count > limits.rows)
        if full and count > 1:
            yield slice(start, row)
            start, wider = row, max(least, length)
        width = wider
    if lengths:
        yield slice(start, len(lengths))


def padded_tokens(passes: list[Pass]) -> int:
    """Tokens that the passes compute, padding with them."""
    return sum(len(part.rows) * part.width for part in passes)


def _parts(rows: int, width: int, limits: PassLimits) -> int:
    """Passes for so many rows of one width."""
    most = max(1, limits.tokens // width)
    return -(-rows // (most if limits.rows is None else min(most, limits.rows)))


def _best_cuts(levels: list[int], ends: list[int], limits: PassLimits) -> list[tuple[int, int]]:
    """Half-open ranges of levels; ends[i] rows are of the first i levels.

    best(j) = min over i < j of best(i) + cost of levels i..j-1 padded to the last of them.
    """
    best, source = [0], [0]
    for high in range(1, len(levels) + 1):
        width = levels[high - 1]
        costs = []
        for low in range(high):
            rows = ends[high] - ends[low]
            overhead = limits.overhead_tokens * _parts(rows, width, limits)
            costs.append(best[low] + rows * width + overhead)
        best.append(min(costs))
        source.append(costs.index(best[-1]))
    cuts, high = [], len(levels)
    while high:
        cuts.append((source[high], high))
        high = source[high]
    return cuts[::-1]
