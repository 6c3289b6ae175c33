"""One factor as integers and a scale.

b bits (8 or 4), q = 2^(b-1) - 1 levels each side, scale s = max|x| / q as bfloat16 rounded up:

    bytes 0-1   s, the upper half of a float32, little-endian
    then        int8: one byte a value; int4: two values a byte, the first in the low nibble

32 bits means plain little-endian float32 without a scale. Values are two's complement; -2^(b-1) and a
padding nibble other than 0 are refused, and so is a negative scale: no bit is free to carry anything.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fedtt.errors import WireError

__all__ = ["decode", "encode", "encoded_bytes"]

PLAIN = 32  #: bits, without a scale
_SCALE_BYTES = 2

Factor = NDArray[np.float32]


def encoded_bytes(bits: int, size: int) -> int:
    """Bytes of one factor of `size` numbers."""
    return 4 * size if bits == PLAIN else _SCALE_BYTES + (size * bits + 7) // 8


def encode(bits: int, x: Factor, noise: np.random.Generator | None) -> bytes:
    """x: (size,). Rounds to nearest, or with `noise` up or down so that the mean is x."""
    if bits == PLAIN:
        return x.astype("<f4").tobytes()
    levels = 2 ** (bits - 1) - 1
    scale, scale_bytes = _scale_up(float(np.abs(x).max(initial=0.0)) / levels)
    scaled = x.astype(np.float64) / scale if scale else np.zeros(x.shape)
    rounded = np.rint(scaled) if noise is None else np.floor(scaled + noise.random(x.shape))
    q = np.clip(rounded, -levels, levels).astype(np.int8)
    return scale_bytes + (q.tobytes() if bits == 8 else _pack_nibbles(q))


def decode(bits: int, rows: NDArray[np.uint8], size: int) -> Factor:
    """The inverse, of n factors of one size, (n, encoded_bytes): (n, size) float32, possibly not finite.

    Raises WireError where integers of any of them are not canonical.
    """
    if bits == PLAIN:
        return rows.view("<f4").astype(np.float32, copy=False)
    scales = np.ascontiguousarray(rows[:, :_SCALE_BYTES]).view("<u2").astype(np.uint32) << 16
    scale = scales.view(np.float32)  # (n, 1)
    if np.signbit(scale).any():
        raise WireError("the payload's scale is negative")
    body = rows[:, _SCALE_BYTES:].view(np.int8)
    q = body if bits == 8 else _unpack_nibbles(body, size)
    if q.size and q.min() == -(2 ** (bits - 1)):
        raise WireError(f"the payload holds {-(2 ** (bits - 1))}, which {bits}-bit values never take")
    with np.errstate(over="ignore", invalid="ignore"):
        values: Factor = q.astype(np.float32) * scale
    return values


def _scale_up(scale: float) -> tuple[float, bytes]:
    """The least bfloat16 not below `scale`, as a number and as its two bytes."""
    word = int(np.float32(scale).view(np.uint32))
    if float(np.float32(scale)) < scale:
        word += 1
    upper = (word + 0xFFFF) >> 16
    return float(np.uint32(upper << 16).view(np.float32)), upper.to_bytes(2, "little")


def _pack_nibbles(q: NDArray[np.int8]) -> bytes:
    nibbles = np.append(q, np.int8(0)) if q.size % 2 else q
    pairs = (nibbles & 0x0F).astype(np.uint8).reshape(-1, 2)
    return (pairs[:, 0] | pairs[:, 1] << 4).tobytes()


def _unpack_nibbles(body: NDArray[np.int8], size: int) -> NDArray[np.int8]:
    low = (body << 4).astype(np.int8) >> 4
    values = np.stack([low, body >> 4], axis=2).reshape(len(body), -1)
    if values[:, size:].any():
        raise WireError("the payload's padding is not zero")
    return values[:, :size]
