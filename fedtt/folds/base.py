"""What every fold shares: the bound on one update's norm.

Norm bounding: Z. Sun, P. Kairouz, A. T. Suresh, H. B. McMahan. "Can you really backdoor federated
learning?" 2019, arXiv 1911.07963, §4.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, ClassVar

import numpy as np
from msgspec import Meta, Struct
from numpy.typing import NDArray

from fedtt.errors import ConfigError
from fedtt.folds.mixing import mix
from fedtt.layout import Theta

__all__ = ["Contribution", "Delta", "FoldBase", "RobustFold", "fewest", "share"]

Delta = NDArray[np.float64]
_ROUNDING = 1e-9  #: 0.29 · 100 is 28.999999999999996 in float64


def share(part: float, count: int) -> int:
    """⌊part · count⌋, of what is meant and not of what rounding made of it."""
    return math.floor(part * count + _ROUNDING)


def fewest(part: float) -> int:
    """⌈1/part⌉, the least count whose share is one."""
    return math.ceil(1 / part - _ROUNDING)


class Contribution(Struct, frozen=True, kw_only=True):
    """One update as the server sees it."""

    #: change of the live factors, (live.size,) of its own rank's layout; in a fold, of what the method folds
    delta: NDArray[np.floating[Any]]
    examples: int  #: as reported by the device
    staleness: int = 0  #: versions its base is older than the one it is folded onto
    rank: int | None = None  #: of the variant it was trained at; None for the adapter's own
    #: rank -> factors of the version it was trained from; None where that is the one it is folded onto
    bases: Mapping[int | None, Theta] | None = None


class FoldBase(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="kind"):
    """One number where devices sent many: how deltas of one round become one delta."""

    norm_bound: Annotated[float, Meta(gt=0, le=1e6)] | None = None  #: longest delta, ‖Δ_k‖₂; None for any

    def bounded(self, contribution: Contribution) -> Delta:
        """Δ_k · min(1, bound / ‖Δ_k‖), (live.size,) in float64."""
        delta = np.asarray(contribution.delta, np.float64)
        if self.norm_bound is None:
            return delta
        norm = float(np.linalg.norm(delta))
        return delta if norm <= self.norm_bound else delta * (self.norm_bound / norm)  # §4: Δ / max(1, ‖Δ‖/M)

    def check(self, updates: int, numbers: int) -> None:
        """Raise ConfigError where a round of so many updates needs more memory than the fold may take."""


class RobustFold(FoldBase, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A fold that compares updates, and so holds all of a round at once; every device counts the same."""

    linear: ClassVar[bool] = False

    mixing: Annotated[float, Meta(ge=0, lt=0.5)] = 0.0  #: share left out of each mean; 0 mixes none
    memory_mb: Annotated[int, Meta(ge=1, le=2**20)] = 2048  #: most that the fold of a round may take

    @property
    def defined_from(self) -> int:
        """Fewest updates it is defined for where nothing is mixed."""
        raise NotImplementedError

    @property
    def least(self) -> int:
        """Fewest updates it is defined for; of fewer than ⌈1/mixing⌉ none would be left out."""
        return max(self.defined_from, fewest(self.mixing) if self.mixing else 0)

    def needed_bytes(self, updates: int, numbers: int) -> int:
        """At the most: each delta as it came in float64, all of them stacked, and a copy that is sorted.

        Where updates are mixed, also the distance of each to each and who is nearest to whom.
        """
        return 3 * 8 * updates * numbers + (2 * 8 * updates**2 if self.mixing else 0)

    def check(self, updates: int, numbers: int) -> None:
        needed_mb = -(-self.needed_bytes(updates, numbers) // 10**6)
        if needed_mb > self.memory_mb:
            raise ConfigError(
                "fold.memory_mb",
                self.memory_mb,
                f"at least {needed_mb}, for {updates} updates of {numbers} numbers at a time; "
                "or a smaller rounds.cohort, or the fold 'mean', which holds a few of them",
            )

    def stacked(self, contributions: Iterable[Contribution]) -> Delta:
        """All deltas, mixed where the fold says so, (n, size); raises ValueError below `least`."""
        bounded = [self.bounded(contribution) for contribution in contributions]
        if len(bounded) < self.least:
            raise ValueError(f"this fold needs {self.least} updates, got {len(bounded)}")
        rows = np.stack(bounded)
        del bounded
        if self.mixing:
            mix(rows, share(self.mixing, len(rows)))
        return rows
