"""The weighted mean, with the staleness weight of buffered asynchrony.

J. Nguyen, K. Malik, H. Zhan, A. Yousefpour, M. Rabbat, M. Malek, D. Huba. "Federated learning with
buffered asynchronous aggregation". AISTATS 2022, arXiv 2106.06639 (FedBuff).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, ClassVar, Literal

import numpy as np
from msgspec import Meta

from fedtt.folds.base import Contribution, Delta, FoldBase

__all__ = ["Mean"]


class Mean(FoldBase, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="mean"):
    """Σ_k n_k s(τ_k) Δ_k / Σ_k n_k with s(τ) = (1 + τ)^-a: a sum, so it needs memory for one update."""

    linear: ClassVar[bool] = True  #: a weighted sum, which may be taken under encryption

    weighting: Literal["examples", "uniform"] = "examples"  #: what n_k is
    max_examples: Annotated[int, Meta(ge=1)] = 1000  #: what a device reports counts up to here
    staleness_exponent: Annotated[float, Meta(ge=0, le=10)] = 0.5  #: a; FedBuff's experiments take ½

    @property
    def least(self) -> int:
        """Fewest updates it is defined for."""
        return 1

    def weight(self, contribution: Contribution) -> float:
        """n_k, bounded so that no device can claim the round for itself."""
        return float(min(contribution.examples, self.max_examples)) if self.weighting == "examples" else 1.0

    def combine(self, size: int, contributions: Iterable[Contribution]) -> Delta:
        """(size,); contributions come in ledger order, so the same ledger always gives the same bits.

        A stale update is scaled down and not made up for: the weights it lost go to nobody.
        """
        total, weights = np.zeros(size, np.float64), 0.0
        for contribution in contributions:
            weight = self.weight(contribution)
            discount = (1.0 + contribution.staleness) ** -self.staleness_exponent  # FedBuff's s(τ)
            total += (weight * discount) * self.bounded(contribution)  # its Algorithm 1: Δ̄ ← Δ̄ + Δ
            weights += weight
        return total / weights if weights else total
