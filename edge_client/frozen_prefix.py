"""Training the last blocks alone: what lies below them is computed once an example and read from then on."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence

import msgspec
import numpy as np

from edge_client.activations import Activations, Half, kept_bytes
from edge_client.bundle import Bundle
from edge_client.runtime import Hidden, Runtime
from edge_client.tokens import Batch, Ids
from fedtt.adapter import AdapterSpec
from fedtt.layout import LiveSet, Theta

__all__ = ["FrozenPrefix", "least_depth"]


def least_depth(adapter: AdapterSpec, live: LiveSet, depths: Sequence[int]) -> int | None:
    """The least of `depths`, which rise, with which all live factors train; None where none is enough."""
    blocks = [adapter.block_of(index) for index in live.indices]
    lowest = min((block for block in blocks if block is not None), default=adapter.layers)
    return next((depth for depth in depths if depth >= adapter.layers - lowest), None)


class FrozenPrefix:
    """Gradients at one depth of one bundle; factors below the cut are those of the version, which stay.

    Hidden states go through float16 whether they were kept or not, and are computed row by row, so that a
    training gives the same bits whatever the cache holds.
    """

    def __init__(
        self,
        runtime: Runtime,
        bundle: Bundle,
        depth: int,
        activations: Activations | None,
        ahead: Iterable[Batch] = (),
    ) -> None:
        """ahead: the batches that will come, whose rows are computed before the first step.

        So the graph below the cut and the one above it do not lie in memory together.
        """
        manifest = bundle.manifest
        self._runtime, self._depth, self._activations = runtime, depth, activations
        self._least = manifest.tokenization.min_tokens
        self._below = manifest.adapter.size_below(depth)
        cut = next(cut for cut in manifest.graphs[runtime.name].depths if cut.depth == depth)
        self._hidden = manifest.adapter.hidden * cut.states
        # the graph says depth, adapters, precision and order of sums; runtimes differ in the last bits
        graph = manifest.files[cut.prefix].sha256
        self._parts = msgspec.json.encode((runtime.name, manifest.model.base_sha256, graph))
        self._frozen: Theta | None = None
        self._hash = hashlib.blake2b()
        self._ahead, self._unread = ahead, set[str]()  #: names of rows that were computed ahead
        self.computed, self.reused = 0, 0  #: rows

    def gradient(self, theta: Theta, batch: Batch) -> tuple[float, Theta]:
        """As of the whole step, and zero for the blocks below."""
        self._begin(theta)
        hidden = np.zeros((*batch.ids.shape, self._hidden), np.float32)
        for row, (ids, mask) in enumerate(self._rows(batch)):
            hidden[row, : len(ids)] = self._row(theta, ids, mask)
        return self._runtime.gradient_above(theta, hidden, batch, self._depth)

    def _rows(self, batch: Batch) -> Iterator[tuple[Ids, Ids]]:
        """Ids and mask (S,) of each row, without padding that the graph does not need."""
        for row, length in enumerate(batch.mask.sum(1).tolist()):
            width = max(self._least, length)
            yield batch.ids[row, :width], batch.mask[row, :width]

    def _begin(self, theta: Theta) -> None:
        """Names say base, runtime, graph and the factors below the cut, of which all of a row follows."""
        below = theta[: self._below]
        if self._frozen is None or not np.array_equal(below, self._frozen):
            self._frozen = below.copy()
            self._hash = hashlib.blake2b(self._parts, digest_size=24)
            self._hash.update(self._frozen.tobytes())
            self._fill(theta)

    def _fill(self, theta: Theta) -> None:
        """Keep what is missing of the rows to come, as far as there is room."""
        if self._activations is None:
            return
        room, seen = self._activations.limit_bytes, set[str]()
        for ids, mask in (row for batch in self._ahead for row in self._rows(batch)):
            key, shape = self._key(ids, mask), (len(ids), self._hidden)
            if key in seen:
                continue
            seen.add(key)
            room -= kept_bytes(shape)
            if room < 0:
                break
            if self._activations.get(key, shape) is None:
                if not self._unread:
                    self._runtime.release()
                self._unread.add(key)
                self._compute(theta, ids, mask, key)
        if self._unread:
            self._runtime.release()

    def _key(self, ids: Ids, mask: Ids) -> str:
        """Token ids stand for text, tokeniser and length limit alike."""
        name = self._hash.copy()
        name.update(np.stack([ids, mask]).tobytes())
        return name.hexdigest()

    def _row(self, theta: Theta, ids: Ids, mask: Ids) -> Hidden | Half:
        """Of one row (S,), (S, W)."""
        key = self._key(ids, mask)
        if self._activations and (kept := self._activations.get(key, (len(ids), self._hidden))) is not None:
            self.reused += key not in self._unread
            self._unread.discard(key)
            return kept
        return self._compute(theta, ids, mask, key)

    def _compute(self, theta: Theta, ids: Ids, mask: Ids, key: str) -> Hidden | Half:
        self.computed += 1
        hidden: Hidden = self._runtime.prefix(theta, Batch(ids=ids[None], mask=mask[None]), self._depth)[0]
        with np.errstate(over="ignore"):
            half: Half = hidden.astype(np.float16)
        if not np.isfinite(half).all():  # a value beyond 65504: this row is computed each time
            return hidden
        if self._activations:
            self._activations.put(key, half)
        return half
