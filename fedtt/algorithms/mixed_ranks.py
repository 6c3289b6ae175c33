"""Devices at different ranks in a task: tiers by memory and speed, and the mean of the factors' products."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from typing import Annotated, ClassVar, NamedTuple

import numpy as np
from msgspec import Meta, Struct
from numpy.typing import NDArray

from fedtt.adapter import AdapterSpec
from fedtt.algorithms.fedavg import FedAvg
from fedtt.errors import ConfigError
from fedtt.folds import Contribution, Fold, Mean
from fedtt.kinds import Lora, Rank, TTBottleneck
from fedtt.layout import FactorLayout, LiveSet
from fedtt.tensor_train import Array
from fedtt.tt_rounding import effective_rank

__all__ = [
    "DenseMean",
    "Matrix",
    "MixedRanks",
    "Product",
    "Tier",
    "Truncation",
    "dense_mean",
    "factors",
    "loose",
]

Matrix = Array  #: computed in float64
Vector = NDArray[np.float64]


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
    a fold the factors are new ones for the same matrices: nothing carries over from one version to the next
    factor by factor, neither a stale delta nor a residual nor a moment.
    """

    any_base: ClassVar[bool] = False
    any_fold: ClassVar[bool] = False

    tiers: Annotated[tuple[Tier, ...], Meta(max_length=8)] = ()  #: from the least rank up

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


def _is_rising(values: Sequence[float]) -> bool:
    return all(lower < upper for lower, upper in itertools.pairwise(values))


class Product(NamedTuple):
    """Some factors of a layout that stand for one matrix."""

    indices: Sequence[int]
    dense: Callable[[Sequence[Matrix]], Matrix]  #: their arrays -> the matrix


class DenseMean(NamedTuple):
    """What a round comes to."""

    matrices: list[Matrix]  #: mean of each product
    loose: Vector  #: mean change of all other numbers, (P,), zero in products


def dense_mean(
    adapter: AdapterSpec,
    bases: Mapping[int | None, NDArray[np.float32]],
    live: LiveSet,
    contributions: Iterable[Contribution],
    fold: Fold,
    products: Callable[[AdapterSpec], Sequence[Product]],
    *,
    of_changes: bool,
) -> DenseMean | None:
    """Σ_k n_k M_k / Σ_k n_k of each product in float64, one update at a time, in ledger order.

    M_k is the product of base + delta at the device's own rank, or with `of_changes` that less the product
    of its base. None where nobody contributed.
    """
    if not isinstance(fold, Mean):
        raise ValueError("matrices of different ranks are folded by their mean alone")
    at = {rank: _AtRank(adapter, rank, base, live, products) for rank, base in bases.items()}
    own = at[None]
    matrices = [np.zeros_like(matrix) for matrix in own.before]
    others, weights = np.zeros(adapter.layout.size), 0.0
    for contribution in contributions:
        here, weight = at[contribution.rank], fold.weight(contribution)
        delta = here.live.scatter(fold.bounded(contribution))
        for total, after, before in zip(matrices, here.dense(here.base + delta), here.before, strict=True):
            total += weight * (after - before if of_changes else after)
        for i in own.loose:
            others[adapter.layout.slices[i]] += weight * delta[here.live.layout.slices[i]]
        weights += weight
    if not weights:
        return None
    return DenseMean([total / weights for total in matrices], others / weights)


class _AtRank:
    """One rank's half of a fold."""

    def __init__(
        self,
        adapter: AdapterSpec,
        rank: int | None,
        base: NDArray[np.float32],
        live: LiveSet,
        products: Callable[[AdapterSpec], Sequence[Product]],
    ) -> None:
        spec = adapter if rank is None else adapter.at_rank(rank)
        self.live, self.base = LiveSet(spec.layout, live.indices), base.astype(np.float64)
        self._products = products(spec)
        self.loose = loose(spec.layout, self._products)

    @cached_property
    def before(self) -> list[Matrix]:
        return self.dense(self.base)

    def dense(self, theta: Vector) -> list[Matrix]:
        return [p.dense(factors(self.live.layout, theta, p.indices)) for p in self._products]


def factors(layout: FactorLayout, theta: Vector, indices: Iterable[int]) -> list[Matrix]:
    """Views into theta (P,), shaped as the factors of these indices."""
    return [theta[layout.slices[i]].reshape(layout.factors[i].shape) for i in indices]


def loose(layout: FactorLayout, products: Iterable[Product]) -> tuple[int, ...]:
    """The factors that belong to no product: biases, a dense head. They are the same at every rank."""
    taken = {i for product in products for i in product.indices}
    return tuple(i for i in layout.everything.indices if i not in taken)


class Truncation:
    """What rounding cut away, matrix by matrix."""

    def __init__(self) -> None:
        self._of_matrix, self._of_change, self._ranks = list[float](), list[float](), list[float]()

    def saw(self, goal: Matrix, change: Matrix, found: Matrix, sigma: Vector) -> None:
        """goal: to be rounded; change: from before the round to it; found: what it was rounded to."""
        lost = float(np.linalg.norm(found - goal))
        self._of_matrix.append(_share(lost, goal))
        self._of_change.append(_share(lost, change))
        self._ranks.append(effective_rank(sigma))

    def report(self) -> dict[str, float]:
        """Shares are of Frobenius norms; empty where nothing was rounded."""
        if not self._ranks:
            return {}
        return {
            "truncated_share_worst": max(self._of_matrix),
            "truncated_share_mean": float(np.mean(self._of_matrix)),
            "truncated_share_of_change_worst": max(self._of_change),
            "truncated_share_of_change_mean": float(np.mean(self._of_change)),
            "effective_rank_least": min(self._ranks),
            "effective_rank_mean": float(np.mean(self._ranks)),
        }


def _share(lost: float, whole: Matrix) -> float:
    norm = float(np.linalg.norm(whole))
    return lost / norm if norm else 0.0
