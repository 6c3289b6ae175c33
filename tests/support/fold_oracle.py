"""Folds and server optimisers number by number, as the papers write them."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

import numpy as np

from fedtt.folds import Contribution, Fold, Krum, Mean, Median, TrimmedMean
from fedtt.server_optimiser import ServerSpec

__all__ = ["folded_by_hand", "krum_by_hand", "one_number"]

Rows = Sequence[Sequence[float]]


def folded_by_hand(fold: Fold, rows: Rows, given: Sequence[Contribution]) -> list[float]:
    """rows: what the updates of `given` come to, (n, size)."""
    if fold.norm_bound is not None:
        norms = [math.sqrt(sum(x * x for x in row)) for row in rows]
        shares = [min(1.0, fold.norm_bound / norm) if norm else 1.0 for norm in norms]
        rows = [[share * x for x in row] for share, row in zip(shares, rows, strict=True)]
    columns = list(zip(*rows, strict=True))
    match fold:
        case Mean():
            weights = [min(c.examples, fold.max_examples) for c in given]
            ages = [(1 + c.staleness) ** -fold.staleness_exponent for c in given]
            shares = [w * s / sum(weights) for w, s in zip(weights, ages, strict=True)]
            return [sum(share * x for share, x in zip(shares, column, strict=True)) for column in columns]
        case Median():
            return [statistics.median(column) for column in columns]
        case TrimmedMean():
            cut = int(fold.trim * len(rows))
            return [statistics.fmean(sorted(column)[cut : len(rows) - cut]) for column in columns]
        case Krum():
            return krum_by_hand(fold, rows)


def krum_by_hand(fold: Krum, rows: Rows) -> list[float]:
    """§4: s(i) = Σ ‖V_i - V_j‖² over the n - f - 2 nearest j; the mean of the m lowest, first ones first."""
    scores = []
    for i, v in enumerate(rows):
        apart = sorted(
            sum((a - b) ** 2 for a, b in zip(v, w, strict=True)) for j, w in enumerate(rows) if j != i
        )
        scores.append(sum(apart[: len(rows) - fold.hostile - 2]))
    best = sorted(range(len(rows)), key=lambda i: (scores[i], i))[: fold.selected]
    return [sum(rows[i][at] for i in best) / len(best) for at in range(len(rows[0]))]


def one_number(spec: ServerSpec, deltas: Sequence[float]) -> list[float]:
    """One number's steps: Hsu et al. for momentum, Reddi et al. Algorithm 2 for the others.

    Moments are kept in float32 from fold to fold: where v = Δ², Yogi's sign hangs on the last bit.
    """
    eta, b1, b2, tau = spec.rate, spec.momentum, spec.second_moment, spec.adaptivity
    m, v, steps = 0.0, float(np.float32(tau**2)), list[float]()
    for delta in deltas:
        if spec.optimiser == "sgd":
            steps.append(eta * delta)
        elif spec.optimiser == "momentum":
            m = b1 * m + delta
            steps.append(eta * m)
        else:
            m = b1 * m + (1 - b1) * delta
            if spec.optimiser == "adam":
                v = b2 * v + (1 - b2) * delta**2
            else:
                sign = (v > delta**2) - (v < delta**2)
                v = v - (1 - b2) * delta**2 * sign
            steps.append(eta * m / (math.sqrt(v) + tau))
        m, v = float(np.float32(m)), float(np.float32(v))
    return steps
