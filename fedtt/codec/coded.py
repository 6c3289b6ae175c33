"""Integers and scales through the range coder: what is frequent, zeros first of all, takes few bits.

A number k has a class, the bits of |k|: 0 for 0, 1 for 1, 2 for 2 and 3, and so on up to the largest that
there is. It is coded as

    the class     a one for each class passed, then a zero unless it was the last: a context for each place
    below it      the bits of |k| after its first: the highest by a context of its class, the rest raw
    the sign      raw, one for a negative k; none for 0

A block is its scale, as a number like these: the difference from that of the block before, modulo the 2^b
values that b bits have, of the least absolute value, with contexts of its own; then, unless its scale is 0,
its integers. All blocks share the contexts of integers, for their scales have made them alike.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence

import numpy as np

from fedtt.codec.plain import Decoded, Run
from fedtt.codec.quantise import Integers
from fedtt.codec.range_coder import Decoder, Encoder
from fedtt.errors import WireError

__all__ = ["decode", "encode"]

_CONTEXTS = 64
_SCALES = 32  #: where the contexts of scales begin; each kind has 16 of places and 16 of classes
_FIRST_SCALE = 0x3C00  #: 2^-7, of about the size of a factor's change


def encode(levels: int, scale_bits: int, blocks: Iterable[tuple[Integers, int]]) -> bytes:
    """blocks: integers within ±`levels`, and scale of each, of which `scale_bits` of 16 bits are in use."""
    coder, deepest = Encoder(_CONTEXTS), levels.bit_length()
    spare, last, half = 16 - scale_bits, _FIRST_SCALE, 1 << (scale_bits - 1)
    for q, word in blocks:
        difference = (word - last) >> spare
        _encode(coder, _SCALES, scale_bits, (difference + half) % (2 * half) - half)
        if word:
            for k in q.tolist():
                _encode(coder, 0, deepest, k)
        last = word
    return coder.finish()


def decode(levels: int, scale_bits: int, data: bytes, runs: Sequence[Run]) -> list[Decoded]:
    """The inverse, as `plain.decode` of one row; any bytes give blocks of these sizes or a WireError.

    Time and memory are bounded by the sizes, whatever the bytes say: one byte a number and two a scale.
    """
    coder, deepest = Decoder(data, _CONTEXTS), levels.bit_length()
    spare, word, found = 16 - scale_bits, _FIRST_SCALE, []
    for count, size in runs:
        q, words = array("b", bytes(count * size)), array("H", bytes(2 * count))
        for block in range(count):
            difference = _decode(coder, _SCALES, scale_bits)
            words[block] = word = (word + (difference << spare)) % (1 << 16)
            if word >> 15:
                raise WireError("the payload's scale is negative")
            if word:
                for at in range(block * size, (block + 1) * size):
                    q[at] = _decode(coder, 0, deepest)
        integers, scales = np.asarray(q, np.int8), np.asarray(words, np.uint16)
        found.append((integers.reshape(1, count, size), scales.reshape(1, count, 1)))
    coder.finish()
    return found


def _encode(coder: Encoder, contexts: int, deepest: int, k: int) -> None:
    size = abs(k)
    bits = size.bit_length()
    for place in range(bits):
        coder.bit(contexts + place, 1)
    if bits < deepest:
        coder.bit(contexts + bits, 0)
    if bits > 1:
        coder.bit(contexts + 16 + bits - 1, size >> (bits - 2) & 1)
        coder.raw(size & ((1 << (bits - 2)) - 1), bits - 2)
    if k:
        coder.raw(k < 0, 1)


def _decode(coder: Decoder, contexts: int, deepest: int) -> int:
    bits = 0
    while bits < deepest and coder.bit(contexts + bits):
        bits += 1
    if not bits:
        return 0
    size = 1
    if bits > 1:
        size = 2 | coder.bit(contexts + 16 + bits - 1)
        size = size << (bits - 2) | coder.raw(bits - 2)
    return -size if coder.raw(1) else size
