"""One block of numbers as integers and a scale.

A quantiser has b bits and q = 2^(b-1) - 1 levels each side; an integer k stands for k times the scale s,
a bfloat16, the upper half of a float32:

    int8 … int2   q = 127, 7, 3, 1     s = max|x| / q, rounded up, so that nothing is clipped
    ternary       q = 1                s = mean of the |x| from 0.7 mean|x| on, rounded up; max|x|, rounded
                                       up, where rounding is stochastic, so that it is right in the mean
    sign          q = 1                s = mean of the |x| that are not 0, rounded up to 3 bits of mantissa
    rms           q = 127              s = `step` times the root mean square, at most max|x|, at least
                                       max|x| / 127, rounded up to 3 bits of mantissa, which code in few bits

Ternary to nearest is F. Li, B. Liu, "Ternary weight networks", 2016, arXiv 1605.04711, with its threshold
at s / 2; stochastic W. Wen et al., "TernGrad", NeurIPS 2017, arXiv 1705.07878, eq. 1.
Sign, which rounds away from 0 alone, is S. P. Karimireddy, Q. Rebjock, S. Stich, M. Jaggi, "Error feedback
fixes signSGD", ICML 2019, arXiv 1901.09847 (EF-signSGD).

Rounding to nearest brings every number nearer or leaves it, and the largest nearer: it is contractive. So is
sign: ‖x - s sign(x)‖² = ‖x‖² - (1 - ε²) (Σ|x|)² / n over the n numbers that are not 0, s being 1 + ε means.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

__all__ = ["LEVELS", "SCALE_BITS", "Integers", "Quantiser", "decode", "encode", "surely_finite"]

Quantiser = Literal["int8", "int4", "int3", "int2", "ternary", "sign", "rms"]
Integers = NDArray[np.int8]
Block = NDArray[np.float32]

LEVELS: dict[str, int] = {"int8": 127, "int4": 7, "int3": 3, "int2": 1, "ternary": 1, "sign": 1, "rms": 127}
SCALE_BITS: dict[str, int] = {"sign": 12, "rms": 12}  #: upper bits of a float32 in a scale; else 16
_TERNARY_THRESHOLD = 0.7


def encode(form: Quantiser, x: Block, step: float, noise: np.random.Generator | None) -> tuple[Integers, int]:
    """x: (n,) -> integers (n,) and the scale's upper half; with `noise` up or down, so that the mean is x."""
    levels = LEVELS[form]
    word = _round_up(_scale(form, x, step, noise), SCALE_BITS.get(form, 16))
    if form == "sign":
        return np.sign(x).astype(np.int8), word
    scale = float(_numbers(np.uint16(word)))
    scaled = x.astype(np.float64) / scale if scale else np.zeros(x.shape)
    rounded = np.rint(scaled) if noise is None else np.floor(scaled + noise.random(x.shape))
    return np.clip(rounded, -levels, levels).astype(np.int8), word


def decode(integers: Integers, words: NDArray[np.uint16]) -> Block:
    """The numbers that integers (..., size) and scales (..., 1) stand for, float32, possibly not finite."""
    values: Block = integers.astype(np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        values *= _numbers(words)
    return values


def surely_finite(levels: int, words: NDArray[np.uint16]) -> bool:
    """Whether scales that are not negative leave every integer of so many levels finite."""
    largest = np.finfo(np.float32).max / np.float32(levels)
    return bool(_numbers(words).max(initial=0) <= largest)


def _scale(form: Quantiser, x: Block, step: float, noise: np.random.Generator | None) -> float:
    sizes = np.abs(x.astype(np.float64))
    largest = float(sizes.max(initial=0.0))
    if form == "sign":
        # EF-signSGD's ‖p‖₁ / d, where d are the numbers that are not 0, as the others stay 0
        return float(sizes.sum()) / max(1, int(np.count_nonzero(sizes)))
    if form == "rms":
        return min(largest, max(step * float(np.sqrt(np.mean(sizes**2))), largest / LEVELS[form]))
    if form == "ternary" and noise is None:
        return float(np.mean(sizes[sizes >= _TERNARY_THRESHOLD * sizes.mean()]))  # Ternary weight networks
    return largest / LEVELS[form]


def _round_up(scale: float, bits: int) -> int:
    """The upper half of the least float32 not below `scale` that has zeros past its first `bits` bits."""
    word = int(np.float32(scale).view(np.uint32))
    if float(np.float32(scale)) < scale:
        word += 1
    below = 32 - bits
    return (word + (1 << below) - 1) >> below << (16 - bits)


def _numbers(words: NDArray[np.uint16] | np.uint16) -> NDArray[np.float32] | np.float32:
    upper = words.astype(np.uint32) << np.uint32(16)
    return upper.view(np.float32)
