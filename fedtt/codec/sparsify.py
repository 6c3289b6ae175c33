"""The smallest numbers left out: what remains is sent, and the entropy coder makes the zeros cheap.

top-k: K. Kuo, A. Raje, K. Rajesh, V. Smith. "Federated LoRA with sparse communication". 2024, arXiv
2406.05233 (FLASC), Algorithm 1, over all live numbers together. Both forms bring every number nearer to zero
alone where it is zeroed, so they are contractive as long as one is kept.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["largest"]

Delta = NDArray[np.float32]


def largest(delta: Delta, keep: float, threshold: float) -> Delta:
    """delta: (n,). Zero but for the ⌈keep · n⌉ largest, and of these those of `threshold` root mean squares.

    The largest of all is always kept; of equals those that come first.
    """
    sizes = np.abs(delta.astype(np.float64))
    kept = np.zeros(delta.shape, bool)
    kept[np.argsort(-sizes, kind="stable")[: int(np.ceil(keep * delta.size))]] = True
    if threshold:
        kept &= sizes >= min(threshold * float(np.sqrt(np.mean(sizes**2))), float(sizes.max()))
    return np.where(kept, delta, np.float32(0))
