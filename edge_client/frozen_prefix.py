"""Training the last blocks alone: what lies below them is computed once an example and read from then on."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import msgspec
import numpy as np
from msgspec.structs import replace
from numpy.typing import NDArray

from edge_client.activations import Activations, Half
from edge_client.bundle import Bundle
from edge_client.runtime import Hidden, Runtime
from edge_client.tokens import Batch
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

    def __init__(self, runtime: Runtime, bundle: Bundle, depth: int, activations: Activations | None) -> None:
        manifest = bundle.manifest
        self._runtime, self._depth, self._activations = runtime, depth, activations
        self._least = manifest.tokenization.min_tokens
        self._below, self._hidden = manifest.adapter.size_below(depth), manifest.adapter.hidden
        # runtimes differ in the last bits
        parts = (runtime.name, manifest.model.base_sha256, depth, replace(manifest.adapter, head=None))
        self._parts = msgspec.json.encode(parts) if manifest.adapter.depth else msgspec.json.encode(parts[:3])
        self._frozen: Theta | None = None
        self._hash = hashlib.blake2b()
        self.computed, self.reused = 0, 0  #: rows

    def gradient(self, theta: Theta, batch: Batch) -> tuple[float, Theta]:
        """As of the whole step, and zero for the blocks below."""
        self._begin(theta)
        hidden = np.zeros((*batch.ids.shape, self._hidden), np.float32)
        for row, length in enumerate(batch.mask.sum(1).tolist()):
            width = max(self._least, length)
            hidden[row, :width] = self._row(theta, batch.ids[row, :width], batch.mask[row, :width])
        return self._runtime.gradient_above(theta, hidden, batch, self._depth)

    def _begin(self, theta: Theta) -> None:
        """Names are those of the factors below the cut."""
        below = theta[: self._below]
        if self._frozen is None or not np.array_equal(below, self._frozen):
            self._frozen = below.copy()
            self._hash = hashlib.blake2b(self._parts, digest_size=24)
            self._hash.update(self._frozen.tobytes())

    def _row(self, theta: Theta, ids: NDArray[np.int64], mask: NDArray[np.int64]) -> Hidden | Half:
        """Of one row (S,), (S, H). Token ids stand for text, tokeniser and length limit alike."""
        name = self._hash.copy()
        name.update(np.stack([ids, mask]).tobytes())
        key, shape = name.hexdigest(), (len(ids), self._hidden)
        if self._activations and (kept := self._activations.get(key, shape)) is not None:
            self.reused += 1
            return kept
        self.computed += 1
        hidden: Hidden = self._runtime.prefix(theta, Batch(ids=ids[None], mask=mask[None]), self._depth)[0]
        with np.errstate(over="ignore"):
            half: Half = hidden.astype(np.float16)
        if not np.isfinite(half).all():  # a value beyond 65504: this row is computed each time
            return hidden
        if self._activations:
            self._activations.put(key, half)
        return half
