"""Devices at different ranks in a task: tiers by memory and speed, and folds of what their factors stand for.

Factors of different ranks have no numbers in common, and after a fold the same matrix has other factors. So
folds and server optimisers see the vectors of `dense_space`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Annotated, ClassVar

import numpy as np
from msgspec import Meta, Struct
from msgspec.structs import replace

from fedtt.adapter import AdapterSpec
from fedtt.algorithms.base import Folded, Moved
from fedtt.algorithms.dense_space import (
    Dense,
    Matrix,
    Product,
    Truncation,
    Vector,
    factors_of,
    loose_of,
    put_,
)
from fedtt.algorithms.fedavg import FedAvg
from fedtt.errors import ConfigError
from fedtt.folds import Contribution, Fold
from fedtt.kinds import Lora, Rank, TTBottleneck
from fedtt.layout import LiveSet, Theta

__all__ = ["MixedRanks", "Tier"]

_GREATEST = float(np.finfo(np.float32).max)


class Tier(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Devices with less memory, or that take longer, train at this rank.

    Defaults are left out of plans, so that clients that know of memory alone read tiers by memory alone.
    """

    rank: Rank
    below_mb: Annotated[int, Meta(ge=1, le=10**9)] | None = None  #: of what the device lets training use
    slower_than_s: Annotated[float, Meta(gt=0, le=10**9)] | None = None  #: from lease to receipt

    def __post_init__(self) -> None:
        if self.below_mb is None and self.slower_than_s is None:
            raise ConfigError("method.tiers.below_mb", None, "left out only where there is slower_than_s")

    def holds(self, memory_mb: int, time_s: float | None) -> bool:
        """Whether a device with so much memory (0: it did not say) that took so long (None: unmeasured) is
        of this tier, or of one below it."""
        is_small = self.below_mb is not None and 0 < memory_mb < self.below_mb
        return is_small or (
            self.slower_than_s is not None and time_s is not None and time_s > self.slower_than_s
        )


class MixedRanks(FedAvg, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What methods share whose factors mean something as products alone.

    Each rank is a variant with versions of its own, made by the server from every version of the task. After
    a fold the factors are new ones for the same matrices, so a residual means nothing in the next round. A
    stale delta does, on the factors that it was trained from: its change of the matrices, like the moments
    of a server optimiser, is of entries that stay what they are.
    """

    tiers: Annotated[tuple[Tier, ...], Meta(max_length=8)] = ()  #: from the least rank up

    #: whether a mean is of the matrices themselves, and not of their changes, each against its own base
    averages_products: ClassVar[bool] = False

    def __post_init__(self) -> None:
        falling = [-tier.slower_than_s for tier in self.tiers if tier.slower_than_s is not None]
        rising = [tier.below_mb for tier in self.tiers if tier.below_mb is not None]
        if not all(_is_rising(values) for values in (self.ranks, rising, falling)):
            raise ConfigError(
                "method.tiers",
                [(tier.rank, tier.below_mb, tier.slower_than_s) for tier in self.tiers],
                "(rank, below_mb, slower_than_s) rising, rising and falling from tier to tier",
            )

    @property
    def ranks(self) -> tuple[int, ...]:
        return tuple(tier.rank for tier in self.tiers)

    @property
    def residual_lasts(self) -> bool:
        return False

    def rank_for(self, memory_mb: int, time_s: float | None = None) -> int | None:
        """Of the first tier that holds it; a device without a measurement goes by its memory alone."""
        fitting = (tier.rank for tier in self.tiers if tier.holds(memory_mb, time_s))
        return next(fitting, None)

    def check_tiers(self, adapter: AdapterSpec) -> None:
        """Raise ConfigError unless every tier's rank is below the adapter's own."""
        match adapter.inserted:
            case TTBottleneck(down=down, up=up):
                own = min(down.rank, up.rank)
            case Lora(rank=own):
                pass
            case _:
                own = 1
        if self.ranks and self.ranks[-1] >= own:
            raise ConfigError("method.tiers", list(self.ranks), f"ranks below {own}, the bundle's own")

    def products(self, adapter: AdapterSpec) -> Sequence[Product]:
        """What the adapter's factors stand for, in the order of the layout."""
        raise NotImplementedError

    def space(self, adapter: AdapterSpec, live: LiveSet) -> LiveSet:
        """Every entry of the products that are live, then the other live numbers."""
        return Dense(adapter, self.products(adapter), live.indices).space

    def fold(
        self,
        adapter: AdapterSpec,
        bases: Mapping[int | None, Theta],
        live: LiveSet,
        contributions: Iterable[Contribution],
        fold: Fold,
    ) -> Folded:
        """The fold of D_k = W(θ_{r_k} + Δ_k) - W(θ_{r_k}), θ_{r_k} the base that device k trained from, of
        its own rank and version. Where a mean `averages_products`, of W(θ_{r_k} + Δ_k) - W(θ), θ of the same
        version at the adapter's rank; but what `norm_bound` bounds are the D_k, for what a smaller rank
        cannot hold of W(θ) is none of the device's doing.
        """
        of_products = fold.linear and self.averages_products
        at: dict[int | None, Dense] = {None: Dense(adapter, self.products(adapter), live.indices)}
        for rank in self.ranks:
            small = adapter.at_rank(rank)
            at[rank] = Dense(small, self.products(small), live.indices)

        newest: dict[int | None, Vector] = {}  # W of the bases that most devices have

        def before(sent: Contribution, rank: int | None) -> Vector:
            if sent.bases is not None:
                return at[rank].of(sent.bases[rank])
            if rank not in newest:
                newest[rank] = at[rank].of(bases[rank])
            return newest[rank]

        def changes() -> Iterator[Contribution]:
            for sent in contributions:
                change = at[sent.rank].after((sent.bases or bases)[sent.rank], sent.delta)
                if of_products and fold.norm_bound is not None:
                    own = before(sent, sent.rank)
                    change = fold.bounded(replace(sent, delta=_limited(change - own))) + own
                change -= before(sent, None if of_products else sent.rank)
                yield replace(sent, delta=_limited(change))

        unbounded = replace(fold, norm_bound=None) if of_products else fold  # is bounded above
        return Folded(delta=unbounded.combine(at[None].space.size, changes()))

    def moved(self, adapter: AdapterSpec, theta: Theta, live: LiveSet, step: Vector) -> Moved:
        """The factors of W(θ) + step at the adapter's rank; a matrix that stays keeps its factors to the bit.

        Reported: the Frobenius norm that rounding cut away, as a share of the matrix and of its step, and
        the effective rank of the products.
        """
        here, layout = Dense(adapter, self.products(adapter), live.indices), adapter.layout
        new, truncation, parts = theta.astype(np.float64), Truncation(), here.parts(step)
        for product, part in zip(here.products, parts, strict=False):
            change = part.reshape(product.shape)
            if change.any():
                near = factors_of(layout, new, product.indices)
                goal = product.dense(near) + change
                cut = product.rounded(goal, near)
                truncation.saw(goal, change, product.dense(cut.factors), cut.sigma)
                put_(layout, new, product.indices, cut.factors)
        for index, part in zip(here.loose, parts[len(here.products) :], strict=True):
            new[layout.slices[index]] += part
        return Moved(theta=new, report=truncation.report())

    def variant(self, adapter: AdapterSpec, theta: Theta, rank: int) -> Theta:
        """Every product cut to the smaller rank; all else is the same."""
        small, wide = adapter.at_rank(rank), theta.astype(np.float64)
        new, alike = np.zeros(small.layout.size), adapter.layout.factors
        for own, low in zip(self.products(adapter), self.products(small), strict=True):
            found: Sequence[Matrix] = factors_of(adapter.layout, wide, own.indices)
            if any(alike[i] != small.layout.factors[i] for i in low.indices):
                found = low.rounded(own.dense(found), found).factors
            put_(small.layout, new, low.indices, found)
        loose = loose_of(small, self.products(small))
        put_(small.layout, new, loose, factors_of(adapter.layout, wide, loose))
        return new.astype(np.float32)


def _limited(change: Vector) -> Vector:
    """No more than an update of plain numbers may hold, and so finite, whatever a device sent."""
    if change.min() >= -_GREATEST and change.max() <= _GREATEST:
        return change
    return np.clip(np.nan_to_num(change), -_GREATEST, _GREATEST)


def _is_rising(values: Sequence[float]) -> bool:
    return all(lower < upper for lower, upper in itertools.pairwise(values))
