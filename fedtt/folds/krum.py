"""Krum and multi-Krum.

P. Blanchard, E. M. El Mhamdi, R. Guerraoui, J. Stainer. "Machine learning with adversaries: Byzantine
tolerant gradient descent". NeurIPS 2017, arXiv 1703.02757.
How many multi-Krum may select: G. Damaskinos et al. "AggregaThor: Byzantine machine learning via robust
gradient aggregation". SysML 2019, Theorem 1.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated

import numpy as np
from msgspec import Meta

from fedtt.folds.base import Contribution, Delta, RobustFold
from fedtt.folds.mixing import squared_distances

__all__ = ["Krum"]


class Krum(RobustFold, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="krum"):
    """The mean of the `selected` updates with the lowest scores; every device counts the same, however stale.

    A score is the sum of squared distances to the n - f - 2 nearest others (§4); `selected` = 1 is Krum, more
    is multi-Krum.
    """

    hostile: Annotated[int, Meta(ge=1, le=10_000)] = 1  #: f, how many hostile updates a round may hold
    selected: Annotated[int, Meta(ge=1, le=10_000)] = 1  #: m

    @property
    def defined_from(self) -> int:
        """n ≥ 2f + 3 (Proposition 1) and m ≤ n - f - 2 (AggregaThor, Theorem 1)."""
        return max(2 * self.hostile + 3, self.selected + self.hostile + 2)

    def needed_bytes(self, updates: int, numbers: int) -> int:
        """And the distance of each to each."""
        return max(super().needed_bytes(updates, numbers), 8 * updates * (3 * numbers + updates))

    def combine(self, size: int, contributions: Iterable[Contribution]) -> Delta:
        """(size,); raises ValueError below `least`."""
        rows = self.stacked(contributions)
        distances = squared_distances(rows)
        np.fill_diagonal(distances, np.inf)
        distances.sort(axis=1)
        neighbours = len(rows) - self.hostile - 2
        scores = distances[:, :neighbours].sum(axis=1)  # §4: s(i), of which Krum takes the least
        best = np.argsort(scores, kind="stable")[: self.selected]
        return np.asarray(rows[np.sort(best)].mean(axis=0))
