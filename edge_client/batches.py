"""The batches of one training: which rows, in which order, and their token ids."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from edge_client.examples import Example, label_index
from edge_client.tokens import Batch, Tokens
from fedtt.manifest import Manifest
from fedtt.messages import Plan
from fedtt.rng import Purpose, rng_for

__all__ = ["Batches", "address", "batch_rows"]


def address(device: str) -> int:
    """A device's place among the streams of `rng_for`: the first 64 bits of its name."""
    return int(device[:16], 16)


class Batches:
    """Those of a plan on one device's examples, whose texts are read all at once, before the first."""

    def __init__(
        self, plan: Plan, device: str, manifest: Manifest, tokens: Tokens, examples: Sequence[Example]
    ) -> None:
        self._plan, self._device, self._tokens, self._count = plan, device, tokens, len(examples)
        self._labels = [label_index(e, manifest.labels) for e in examples] if manifest.labels else None
        self._texts = {row: examples[row].words for rows in self._first() for row in rows.tolist()}
        self._rows: dict[int, tuple[NDArray[np.int32], bool]] = {}  #: token ids, and whether they were cut
        self.cut_texts = 0

    @property
    def are_known(self) -> bool:
        """Whether no tokenizer has to be read for them."""
        return self._tokens.know(list(self._texts.values()))

    def read(self, go_on: Callable[[], None] = lambda: None) -> None:
        """Read the texts; afterwards no tokenizer is needed. go_on: called before each; may raise."""
        if not self._rows:
            rows, cuts = self._tokens.rows(list(self._texts.values()), go_on)
            found = zip(self._texts, rows, cuts, strict=True)
            self._rows = {row: (np.array(ids, np.int32), cut) for row, ids, cut in found}

    def __iter__(self) -> Iterator[Batch]:
        for batch, cut in self._made(self._order()):
            self.cut_texts += cut
            yield batch

    def ahead(self) -> Iterator[Batch]:
        """Those from the first on that have rows which none before had, to be looked at only."""
        return (batch for batch, _ in self._made(self._first()))

    def _made(self, order: Iterator[NDArray[np.intp]]) -> Iterator[tuple[Batch, int]]:
        self.read()
        for rows in order:
            labels = None if self._labels is None else [self._labels[row] for row in rows]
            found = [self._rows[row] for row in rows.tolist()]
            yield self._tokens.padded(*(ids for ids, _ in found), labels=labels), sum(cut for _, cut in found)

    def _first(self) -> Iterator[NDArray[np.intp]]:
        """Of the first epoch, in which each row is once: whatever a plan asks for, no more than there are."""
        return islice(self._order(), -(-self._count // self._plan.training.batch_size))

    def _order(self) -> Iterator[NDArray[np.intp]]:
        training = self._plan.training
        rng = rng_for(self._plan.seed, Purpose.BATCHES, self._plan.round, address(self._device))
        return batch_rows(self._count, training.batch_size, training.local_steps, rng)


def batch_rows(count: int, size: int, steps: int, rng: np.random.Generator) -> Iterator[NDArray[np.intp]]:
    """`steps` batches of row numbers in 0..count-1: shuffled epochs, the last batch of each may be short."""
    while True:
        order = rng.permutation(count)
        for start in range(0, count, size):
            if steps == 0:
                return
            steps -= 1
            yield order[start : start + size]
