"""Differential privacy of what one device sends: what a task asks for, and what it comes to.

DP-SGD: M. Abadi et al. "Deep learning with differential privacy". CCS 2016, arXiv 1607.00133.
Gaussian DP: J. Dong, A. Roth, W. J. Su. "Gaussian differential privacy". JRSS B 84(1), 2022, arXiv
1905.02383.
Zero-out adjacency: P. Kairouz et al. "Practical and private (deep) learning without sampling or
shuffling". ICML 2021, arXiv 2103.00039.

Neighbours are two sets of a device's examples of which one has an example whose gradients are zero instead.
A batch's sum of clipped gradients then differs by `clip` at most, whatever the batches are, and noise of
standard deviation σ · clip makes each step in which the example takes part 1/σ-GDP. k of them are √k/σ-GDP,
exactly (Corollary 3.3). Devices do not come by Poisson sampling, so no amplification is counted.
"""

from __future__ import annotations

import math
from typing import Annotated

from msgspec import Meta, Struct

__all__ = ["PrivacySpec", "epsilon_of", "participations"]


class PrivacySpec(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Noise that each device adds to its training, so that what it sends says little of any example."""

    clip: Annotated[float, Meta(gt=0, le=1e6)]  #: largest norm of one example's gradient, C
    noise_multiplier: Annotated[float, Meta(ge=0.01, le=1e6)]  #: σ: noise on a batch's sum, over C
    epsilon: Annotated[float, Meta(gt=0, le=1e3)] | None = None  #: past which a device declines, if any
    delta: Annotated[float, Meta(gt=0, lt=1)] = 1e-5

    def spent(self, examples: int, batch_size: int, steps: int) -> float:
        """μ² of one training; those of several add up."""
        return participations(examples, batch_size, steps) / self.noise_multiplier**2


def participations(examples: int, batch_size: int, steps: int) -> int:
    """The most batches of a training that one example is in: shuffled epochs, as `batch_rows` deals them."""
    return math.ceil(steps / math.ceil(examples / batch_size))


def epsilon_of(mu_squared: float, delta: float) -> float:
    """The least ε for which √μ²-GDP is (ε, δ)-DP (Corollary 2.13).

    δ(ε) = Φ(μ/2 - ε/μ) - e^ε Φ(-μ/2 - ε/μ)
    """
    if not mu_squared:
        return 0.0
    mu = math.sqrt(mu_squared)
    low, high = 0.0, 1.0
    while _delta(high, mu) > delta:
        high *= 2
    while high - low > 1e-9 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if _delta(middle, mu) > delta else (low, middle)
    return high


def _delta(epsilon: float, mu: float) -> float:
    return _phi(mu / 2 - epsilon / mu) - math.exp(epsilon + _log_phi(-mu / 2 - epsilon / mu))


def _phi(x: float) -> float:
    return math.erfc(-x / math.sqrt(2)) / 2


def _log_phi(x: float) -> float:
    """ln Φ(x); where Φ underflows by its asymptote -x²/2 - ln(-x √2π), which is above it."""
    return math.log(_phi(x)) if x > -37 else -x * x / 2 - math.log(-x * math.sqrt(2 * math.pi))
