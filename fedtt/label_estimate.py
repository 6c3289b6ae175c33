"""How the labels that a device trained on are distributed, as the change of its classifier's bias says.

A. Wainakh et al. "User-level label leakage from gradients in federated learning". PoPETs 2022(2), arXiv
2105.09369. As a server that samples devices by it: H. Chen, H. Vikalo. "Heterogeneity-guided client sampling:
towards fast and efficient non-IID federated learning". NeurIPS 2024, arXiv 2310.00198 (HiCS-FL).

The gradient of the mean cross-entropy for the bias of label c is p_c - q_c: the share of a batch that the
model takes for c less the share that is c. Over T steps at rate η the bias moves by Δ_c:

    SGD     q_c ∝ Δ_c / (η Σ_t Σ_{s≤t} μ^(t-s)) + 1/4C: the mean of q_c - p_c, and 1/4C as p_c of a label that
            is not there, for which the model mostly takes less than an even share
    AdamW   q_c ∝ r_c + 3/4, r_c = Δ_c / (η T): steps are about equally long whatever the gradient is, so r_c
            says how often the label pulled, from -1 for one that no batch had. p_c varies with the texts,
            which brings few of those above -3/4

Either is cut off at zero. This takes no data, no model and nothing of a device but its update, which says as
much to whoever can read it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedtt.optimiser import TrainingSpec

__all__ = ["estimated_label_counts", "estimated_shares"]

_UNSEEN = 0.25  #: of an even share, what the model takes for a label that is not there
_ABSENT = 0.75  #: -r from which on a label counts as one that is not there

Vector = NDArray[np.float64]


def estimated_shares(shift: NDArray[np.floating[Any]], training: TrainingSpec, steps: int) -> Vector:
    """q (C,), which adds up to 1, from the change (C,) of the bias over so many steps."""
    moved = shift.astype(np.float64) / training.learning_rate
    if training.optimiser == "sgd":
        shares = moved / _path(training.momentum, steps) + _UNSEEN / len(shift)
    else:
        shares = np.clip(moved / steps, -1.0, 1.0) + _ABSENT
    shares = np.maximum(shares, 0.0)
    total = float(shares.sum())
    return shares / total if total else np.full(len(shift), 1 / len(shift))


def _path(momentum: float, steps: int) -> float:
    """Σ_t Σ_{s<=t} μ^(t-s) for t up to T: how far SGD goes at rate 1 along a gradient of 1."""
    return (steps - momentum * (1 - momentum**steps) / (1 - momentum)) / (1 - momentum)


def estimated_label_counts(shares: Vector, examples: int) -> NDArray[np.int64]:
    """Whole numbers (C,) that add up to `examples`, by the largest remainder."""
    exact = shares * examples
    counts = np.floor(exact).astype(np.int64)
    missing = examples - int(counts.sum())
    counts[np.argsort(counts - exact, kind="stable")[:missing]] += 1
    return counts
