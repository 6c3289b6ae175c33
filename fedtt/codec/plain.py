"""Integers and scales side by side, each block by itself: its size is known beforehand.

    2 bytes     the scale, little-endian
    ⌈n b / 8⌉   the integers, b bits each in two's complement, the lowest bit first, byte by byte

-2^(b-1) is never written, spare bits are zero and a scale is not negative: no bit is free to carry anything.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from fedtt.codec.quantise import Integers
from fedtt.errors import WireError

__all__ = ["Words", "decode", "encode", "encoded_bytes"]

_SCALE_BYTES = 2

Rows = NDArray[np.uint8]
Words = NDArray[np.uint16]


def encoded_bytes(levels: int, size: int) -> int:
    """Bytes of one block of `size` numbers."""
    return _SCALE_BYTES + (size * _bits(levels) + 7) // 8


def encode(levels: int, blocks: Iterable[tuple[Integers, int]]) -> bytes:
    """blocks: integers and scale of each."""
    bits = _bits(levels)
    return b"".join(word.to_bytes(_SCALE_BYTES, "little") + _pack(q, bits) for q, word in blocks)


def decode(levels: int, rows: Rows, sizes: Sequence[int]) -> list[tuple[Integers, Words]]:
    """The inverse for n updates, (n, bytes): for each block integers (n, size) and scales (n, 1).

    Raises WireError for what no encoder writes.
    """
    bits, blocks, start = _bits(levels), [], 0
    for size in sizes:
        end = start + encoded_bytes(levels, size)
        words = np.ascontiguousarray(rows[:, start : start + _SCALE_BYTES]).view("<u2")
        if (words >> 15).any():
            raise WireError("the payload's scale is negative")
        q = _unpack(rows[:, start + _SCALE_BYTES : end], bits, size)
        if q.size and q.min() < -levels:
            raise WireError(f"the payload holds {q.min()}, which {bits}-bit values never take")
        blocks.append((q, words))
        start = end
    return blocks


def _bits(levels: int) -> int:
    return levels.bit_length() + 1


def _pack(q: Integers, bits: int) -> bytes:
    each = np.unpackbits(q.view(np.uint8)[:, None], axis=1, count=bits, bitorder="little")
    return np.packbits(each.reshape(-1), bitorder="little").tobytes()


def _unpack(rows: Rows, bits: int, size: int) -> Integers:
    if bits == 8:
        return rows.view(np.int8)
    if 8 % bits:
        each = np.unpackbits(rows, axis=1, bitorder="little")
        loose = each[:, size * bits :]
        raw = each[:, : size * bits].reshape(len(rows), size, bits) @ (1 << np.arange(bits, dtype=np.uint8))
    else:  # several whole numbers a byte
        each = (rows[..., None] >> np.arange(0, 8, bits, dtype=np.uint8)) & np.uint8(2**bits - 1)
        raw, loose = np.split(each.reshape(len(rows), -1), [size], axis=1)
    if loose.any():
        raise WireError("the payload's padding is not zero")
    sign = np.uint8(1 << (bits - 1))
    return ((raw ^ sign) - sign).view(np.int8)
