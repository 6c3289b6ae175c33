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

__all__ = ["Decoded", "Run", "Words", "decode", "encode", "encoded_bytes"]

_SCALE_BYTES = 2

Rows = NDArray[np.uint8]
Words = NDArray[np.uint16]
Run = tuple[int, int]  #: how many blocks of one size follow each other, and numbers of each
Decoded = tuple[Integers, Words]  #: a run of n updates: integers (n, count, size) and scales (n, count, 1)


def encoded_bytes(levels: int, size: int) -> int:
    """Bytes of one block of `size` numbers."""
    return _SCALE_BYTES + (size * _bits(levels) + 7) // 8


def encode(levels: int, blocks: Iterable[tuple[Integers, int]]) -> bytes:
    """blocks: integers and scale of each."""
    bits = _bits(levels)
    return b"".join(word.to_bytes(_SCALE_BYTES, "little") + _pack(q, bits) for q, word in blocks)


def decode(levels: int, rows: Rows, runs: Sequence[Run]) -> list[Decoded]:
    """The inverse for n updates, (n, bytes), run by run.

    Raises WireError for what no encoder writes.
    """
    bits, found, start = _bits(levels), [], 0
    for count, size in runs:
        width = encoded_bytes(levels, size)
        blocks = rows[:, start : start + count * width].reshape(len(rows), count, width)
        words = np.ascontiguousarray(blocks[..., :_SCALE_BYTES]).view("<u2")
        if (words >> 15).any():
            raise WireError("the payload's scale is negative")
        q = _unpack(blocks[..., _SCALE_BYTES:], bits, size)
        if q.size and q.min() < -levels:
            raise WireError(f"the payload holds {q.min()}, which {bits}-bit values never take")
        found.append((q, words))
        start += count * width
    return found


def _bits(levels: int) -> int:
    return levels.bit_length() + 1


def _pack(q: Integers, bits: int) -> bytes:
    each = np.unpackbits(q.view(np.uint8)[:, None], axis=1, count=bits, bitorder="little")
    return np.packbits(each.reshape(-1), bitorder="little").tobytes()


def _unpack(rows: Rows, bits: int, size: int) -> Integers:
    """Blocks (n, count, bytes) -> (n, count, size)."""
    if bits == 8:
        return rows.view(np.int8)
    if 8 % bits:
        each = np.unpackbits(rows, axis=-1, bitorder="little")
        loose = each[..., size * bits :]
        parts = each[..., : size * bits].reshape(*rows.shape[:-1], size, bits)
        raw = parts @ (1 << np.arange(bits, dtype=np.uint8))
    else:  # several whole numbers a byte
        each = (rows[..., None] >> np.arange(0, 8, bits, dtype=np.uint8)) & np.uint8(2**bits - 1)
        raw, loose = np.split(each.reshape(*rows.shape[:-1], -1), [size], axis=-1)
    if loose.any():
        raise WireError("the payload's padding is not zero")
    sign = np.uint8(1 << (bits - 1))
    return ((raw ^ sign) - sign).view(np.int8)
