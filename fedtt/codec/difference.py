"""One version as its difference from another of the same size: lossless, and smaller where they are near.

    places  one byte: 0 to 24, where all numbers of both are whole multiples of 2^-places, else 255
    words   of each vector as uint32: those multiples as int32, else the float32 words
    d = new - base          modulo 2^32
    z = (d << 1) ^ (d >> 31)    zigzag: d as int32, its sign moved into the lowest bit
    planes                  the highest bytes of all z, then the next, then the next, then the lowest
    zlib                    one stream (RFC 1950) over the planes

Two floats of like sign and size differ by few units of the last place, so the high planes are almost all
zero, and numbers that did not change are zero in all four. The rest is noise of the mantissa, which
nothing compresses: a server that publishes factors with few binary places leaves none.

Who holds no version holds the one that is all zeros.
"""

from __future__ import annotations

import zlib

import numpy as np
from numpy.typing import NDArray

from fedtt.errors import LayoutError, WireError

__all__ = ["MOST_PLACES", "decode_difference", "encode_difference"]

MOST_PLACES = 24
_FLOATS = 255
_OVERHEAD_BYTES = 128  #: of a stream that does not compress; its blocks add less than an eighth
_WORD = np.dtype("<u4")

Words = NDArray[np.uint32]


def encode_difference(base: bytes, new: bytes) -> bytes:
    """What `decode_difference` makes `new` of, given `base`: at the worst a little longer than `new`.

    Raises LayoutError where the two are not float32 vectors of one size.
    """
    if len(base) != len(new):
        raise LayoutError(f"a version of {len(new)} bytes has no difference from one of {len(base)}")
    places = next((p for p in range(MOST_PLACES + 1) if _fits(base, p) and _fits(new, p)), _FLOATS)
    signed = (_words(new, places) - _words(base, places)).view(np.int32)
    zigzag = (signed << 1) ^ (signed >> 31)
    planes = zigzag.astype(">i4").view(np.uint8).reshape(-1, _WORD.itemsize).T
    deflate = zlib.compressobj(level=9, memLevel=9)
    pieces = [bytes([places])]
    for plane in planes:  # a flush ends a deflate block: each plane has its own code, worth 1 % of the whole
        pieces += [deflate.compress(plane.tobytes()), deflate.flush(zlib.Z_SYNC_FLUSH)]
    return b"".join([*pieces, deflate.flush()])


def decode_difference(base: bytes, data: bytes) -> bytes:
    """The inverse, as many bytes as `base`; total over all `data`: a value or a WireError.

    The value is the version that was meant only if its sha256 says so. It takes at most ten times the bytes
    of `base` of memory, and 64 KiB, whatever `data` holds and unpacks to.
    """
    wrong = f"a difference between versions does not unpack to exactly {len(base)} bytes"
    if len(data) > len(base) + len(base) // 8 + _OVERHEAD_BYTES:
        raise WireError(wrong)
    places = data[0] if data else _FLOATS
    if places != _FLOATS and not (places <= MOST_PLACES and _fits(base, places)):
        raise WireError(f"a difference between versions is of {places} binary places, the one held is not")
    words = _words(base, places)
    inflate = zlib.decompressobj()
    try:
        # one more, so that a longer stream shows
        planes = inflate.decompress(memoryview(data)[1:], len(base) + 1)
    except zlib.error as error:
        raise WireError(f"a difference between versions is not a zlib stream: {error}") from None
    if len(planes) != len(base) or not inflate.eof or inflate.unused_data:
        raise WireError(wrong)
    zigzag = np.frombuffer(planes, np.uint8).reshape(_WORD.itemsize, -1).T.copy().view(">u4").reshape(-1)
    zigzag = zigzag.astype(np.uint32)
    difference = (zigzag >> 1) ^ (0 - (zigzag & 1))
    return _data(words + difference, places)


def _fits(data: bytes, places: int) -> bool:
    """Whether all numbers are multiples of 2^-places that an int32 holds, and none is -0."""
    with np.errstate(invalid="ignore"):  # NaNs of any kind, which come out as such
        scaled = np.ldexp(_floats(data).astype(np.float64), places)
    return bool((np.abs(scaled) < 2**31).all()) and _data(_integers(scaled), places) == data


def _words(data: bytes, places: int) -> Words:
    if places == _FLOATS:
        return _floats(data).view(_WORD).astype(np.uint32)
    return _integers(np.ldexp(_floats(data).astype(np.float64), places))


def _data(words: Words, places: int) -> bytes:
    if places == _FLOATS:
        return words.astype(_WORD).tobytes()
    return np.ldexp(words.view(np.int32).astype(np.float64), -places).astype("<f4").tobytes()


def _integers(scaled: NDArray[np.float64]) -> Words:
    return scaled.astype(np.int32).view(np.uint32)


def _floats(data: bytes) -> NDArray[np.float32]:
    if len(data) % _WORD.itemsize:
        raise LayoutError(f"{len(data)} bytes are no float32 vector")
    return np.frombuffer(data, "<f4")
