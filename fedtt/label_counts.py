"""How many examples of each label a device has, with noise that hides any single one of them.

Discrete Laplace noise: A. Ghosh, T. Roughgarden, M. Sundararajan. "Universally utility-maximizing privacy
mechanisms". STOC 2009, arXiv 0811.2841 (the geometric mechanism).

Adding or removing one example changes one count by 1: the sensitivity in L1 is 1, and noise with
P(k) ∝ exp(-ε |k|) on each count makes the whole list ε-differentially private by example. It is drawn once
and kept by the device: sent again and again, always the same list says no more than once.

Coded as little-endian int16, two bytes a label. Counts may be negative: a server that sums lists of many
devices would be led astray by noise cut off at zero.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from fedtt.errors import WireError

__all__ = [
    "COUNT_LIMIT",
    "LABEL_LIMIT",
    "decode_label_counts",
    "encode_label_counts",
    "noisy_label_counts",
]

LABEL_LIMIT = 4096  #: labels of a task whose devices may be asked for their counts
COUNT_LIMIT = 2**15 - 1  #: that is told of one label

Counts = NDArray[np.int64]
Uniform = Callable[[], float]  #: the next number in [0, 1), from a source nobody can guess


def noisy_label_counts(labels: Sequence[int], classes: int, epsilon: float, uniform: Uniform) -> bytes:
    """Coded counts of the labels 0..classes-1, each with discrete Laplace noise of its own.

    labels: of every example. uniform: asked twice a class.
    """
    counts = np.bincount(np.asarray(labels, np.intp), minlength=classes)
    noise = [_geometric(epsilon, uniform) - _geometric(epsilon, uniform) for _ in range(classes)]
    return encode_label_counts(counts + np.array(noise, np.int64))


def _geometric(epsilon: float, uniform: Uniform) -> int:
    """G with P(G ≥ k) = exp(-ε k); the difference of two is discrete Laplace."""
    return min(COUNT_LIMIT, math.floor(-math.log(1.0 - uniform()) / epsilon))


def encode_label_counts(counts: Sequence[int] | Counts) -> bytes:
    """What does not fit is cut off, which adds nothing to what the noise gives away."""
    return np.clip(counts, -COUNT_LIMIT, COUNT_LIMIT).astype("<i2").tobytes()


def decode_label_counts(data: bytes, classes: int) -> Counts:
    """(classes,); raises WireError for a list of another length."""
    if len(data) != 2 * classes:
        raise WireError(f"label counts of {len(data)} bytes came, {classes} labels have {2 * classes}")
    return np.frombuffer(data, "<i2").astype(np.int64)
