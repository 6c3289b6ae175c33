"""What is trained: what is inserted into which blocks, and the head, as one spec.

A spec fixes names and shapes of all trained factors, in one order: block by block, then the head. Methods
ask it which factors form a TT matrix or a LoRA pair and which block they belong to; none reads a name.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import Annotated, NamedTuple

import numpy as np
from msgspec import Meta, Struct
from msgspec.structs import replace

from fedtt.errors import ConfigError
from fedtt.kinds import DenseBottleneck, HeadOnly, HeadSpec, Inserted, Lora, Part, TTBottleneck, Width
from fedtt.layout import Factor, FactorLayout, LiveSet, Theta
from fedtt.rng import Purpose, rng_for
from fedtt.tensor_train import TTMatrix

__all__ = ["MOST_FACTORS", "MOST_NUMBERS", "AdapterSpec", "LoraPair", "TTFactors", "initial_theta"]

#: Bounds for foreign specs, as a device holds theta some five times while it trains, and walks its factors.
#: LoRA of rank 64 on all projections of a model of 7 billion has 2^26 numbers, TT adapters of 16
#: cores a matrix in 126 blocks 2^13 factors.
MOST_NUMBERS = 2**27
MOST_FACTORS = 2**13


class TTFactors(NamedTuple):
    """One TT matrix of a spec: which factors of its layout are its cores."""

    prefix: str  #: `block.3.attention.down`, `head.weight`
    matrix: TTMatrix
    indices: range


class LoraPair(NamedTuple):
    """One LoRA update of a spec: the indices of its A (r, d_in) and its B (d_out, r)."""

    prefix: str  #: `block.3.query`
    a: int
    b: int


class AdapterSpec(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, dict=True):
    """`inserted` in each of the last `depth` blocks, and a head on top where the task has one."""

    hidden: Width  #: of the model
    layers: Annotated[int, Meta(ge=1, le=2**10)]  #: its blocks
    depth: Annotated[int, Meta(ge=0, le=2**10)]  #: how many of the last are adapted; 0 where only the head is
    inserted: Inserted
    head: HeadSpec | None = None

    def __post_init__(self) -> None:
        if isinstance(self.inserted, HeadOnly):
            if self.head is None:
                raise ConfigError("adapter", "none", "only with a head: without one nothing would be trained")
            if self.depth:
                raise ConfigError("adapter.depth", self.depth, "0 where nothing is inserted")
        elif not 1 <= self.depth <= self.layers:
            raise ConfigError("adapter.depth", self.depth, f"a whole number from 1 to {self.layers}")
        for width in _widths(self.inserted, self.head):
            if width != self.hidden:
                raise ConfigError("adapter.hidden", self.hidden, f"{width}, the width of its matrices")
        head = self.head.parts(self.hidden) if self.head else ()
        numbers = self.adapter_size + sum(part.size for part in head)
        factors = self.depth * self._factors_a_block + sum(len(part.factors) for part in head)
        if numbers > MOST_NUMBERS or factors > MOST_FACTORS:
            allowed = f"at most {MOST_NUMBERS} numbers in {MOST_FACTORS} factors"
            raise ConfigError("adapter", f"{numbers} numbers in {factors} factors", allowed)

    @property
    def blocks(self) -> range:
        """The numbers of the adapted blocks."""
        return range(self.layers - self.depth, self.layers)

    @property
    def adapter_size(self) -> int:
        """How many numbers of theta, from its start, are not of the head."""
        return self.depth * sum(part.size for part in self.inserted.parts)

    def size_below(self, depth: int) -> int:
        """How many numbers of theta, from its start, are of blocks below the last `depth`."""
        return (self.depth - depth) * sum(part.size for part in self.inserted.parts)

    def live_at(self, depth: int, live: LiveSet) -> LiveSet:
        """Those of the live factors that are in the last `depth` blocks, or the head's.

        Raises LayoutError where there are none.
        """
        lowest = self.layers - depth
        blocks = ((index, self.block_of(index)) for index in live.indices)
        return LiveSet(self.layout, (index for index, block in blocks if block is None or block >= lowest))

    @cached_property
    def layout(self) -> FactorLayout:
        return FactorLayout(
            Factor(f"{prefix}{factor.name}", factor.shape)
            for prefix, part in self._parts()
            for factor in part.factors
        )

    @cached_property
    def tt_matrices(self) -> tuple[TTFactors, ...]:
        """Every TT matrix, that of the head with them, in the order of the layout."""
        return tuple(
            TTFactors(name, part.matrix, indices) for name, part, indices in self._placed() if part.matrix
        )

    @cached_property
    def lora_pairs(self) -> tuple[LoraPair, ...]:
        """Every LoRA update, in the order of the layout."""
        if not isinstance(self.inserted, Lora):
            return ()
        targets = [f"block.{block}.{t.name}" for block in self.blocks for t in self.inserted.targets]
        return tuple(LoraPair(prefix, 2 * i, 2 * i + 1) for i, prefix in enumerate(targets))

    @cached_property
    def _factors_a_block(self) -> int:
        return sum(len(part.factors) for part in self.inserted.parts)

    def block_of(self, index: int) -> int | None:
        """The block that factor `index` of the layout belongs to; None for the head."""
        if not 0 <= index < len(self.layout.factors):
            raise IndexError(f"the layout has {len(self.layout.factors)} factors, there is no number {index}")
        within = index < self.depth * self._factors_a_block
        return self.blocks[index // self._factors_a_block] if within else None

    def at_rank(self, rank: int, *, head_rank: int | None = None) -> AdapterSpec:
        """The same adapters at a smaller rank; the head's TT matrix too where its rank is named.

        Raises ConfigError for a rank above the spec's own, or where there is none to change.
        """
        head = self.head
        if head_rank is not None:
            if head is None or head.matrix is None:
                raise ConfigError("head_rank", head_rank, "only for a head with a TT matrix")
            if not 1 <= head_rank <= head.matrix.rank:
                raise ConfigError("head_rank", head_rank, f"a whole number from 1 to {head.matrix.rank}")
            head = replace(head, matrix=replace(head.matrix, rank=head_rank))
        return replace(self, inserted=self.inserted.at_rank(rank), head=head)

    def _parts(self) -> Iterator[tuple[str, Part]]:
        """Every trained part in the order of the layout, with what stands before its name."""
        for block in self.blocks:
            for part in self.inserted.parts:
                yield f"block.{block}.", part
        for part in self.head.parts(self.hidden) if self.head else ():
            yield "", part

    def _placed(self) -> Iterator[tuple[str, Part, range]]:
        """Every trained part with its full name and the indices of its factors."""
        start = 0
        for prefix, part in self._parts():
            end = start + len(part.factors)
            yield f"{prefix}{part.name}", part, range(start, end)
            start = end


def _widths(inserted: Inserted, head: HeadSpec | None) -> Iterator[int]:
    """All that must be the width of the model. LoRA's projections need not be: heads may be wider."""
    if isinstance(inserted, TTBottleneck):
        yield from (inserted.down.d_in, inserted.up.d_out)
    if isinstance(inserted, DenseBottleneck):
        yield inserted.hidden
    if head and head.matrix:
        yield head.matrix.d_in


def initial_theta(spec: AdapterSpec, seed: int) -> Theta:
    """First values, (P,): every adapter is the identity, a label-name or dense head's matrix is zero.

    What is random has entries of variance 1 / d_in, for a TT matrix those of the dense matrix it stands
    for. Zero are the last core of each `up` and of a label-name head, a dense `up`, B of LoRA, R of
    LoRA-SB, and biases.
    """
    rng = rng_for(seed, Purpose.INITIAL)
    parts: list[Theta] = []
    for _, part in spec._parts():
        for factor, sd in zip(part.factors, part.deviations, strict=True):
            draw = rng.standard_normal(factor.size)  # also where it is not used: addresses stay the same
            parts.append((draw * sd if sd else np.zeros(factor.size)).astype(np.float32))
    return np.concatenate(parts)
