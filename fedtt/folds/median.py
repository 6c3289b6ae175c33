"""Coordinate-wise median and trimmed mean.

D. Yin, Y. Chen, K. Ramchandran, P. Bartlett. "Byzantine-robust distributed learning: towards optimal
statistical rates". ICML 2018, arXiv 1803.01498.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated

import numpy as np
from msgspec import Meta

from fedtt.folds.base import Contribution, Delta, RobustFold, fewest, share

__all__ = ["Median", "TrimmedMean"]


class Median(RobustFold, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="median"):
    """The median of each number (Definition 1); every device counts the same, however stale."""

    @property
    def defined_from(self) -> int:
        """Of two, either moves the median as far as it likes."""
        return 3

    def combine(self, size: int, contributions: Iterable[Contribution]) -> Delta:
        """(size,); raises ValueError below `least`."""
        return np.asarray(np.median(self.stacked(contributions), axis=0))  # Definition 1


class TrimmedMean(RobustFold, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="trimmed-mean"):
    """The mean of each number without the largest and the smallest ⌊βn⌋ of n (Definition 2).

    Every device counts the same, however stale.
    """

    trim: Annotated[float, Meta(ge=0.001, lt=0.5)] = 0.2  #: β: at least the share of hostile devices

    @property
    def defined_from(self) -> int:
        """⌈1/β⌉: of fewer none would be trimmed."""
        return max(3, fewest(self.trim))

    def cut(self, count: int) -> int:
        """⌊β · count⌋, what is dropped at either end."""
        return min(share(self.trim, count), (count - 1) // 2)

    def combine(self, size: int, contributions: Iterable[Contribution]) -> Delta:
        """(size,); raises ValueError below `least`."""
        rows = self.stacked(contributions)
        cut = self.cut(len(rows))
        return np.asarray(np.sort(rows, axis=0)[cut : len(rows) - cut].mean(axis=0))  # Definition 2
