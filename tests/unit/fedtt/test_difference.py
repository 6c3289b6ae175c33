from __future__ import annotations

import contextlib
import struct
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fedtt.codec.difference import decode_difference, encode_difference
from fedtt.errors import LayoutError, WireError

quick = settings(deadline=None, max_examples=100)

#: Zeros of both signs, the least and greatest numbers, infinities, and NaNs that differ in their payloads.
ODD = [0x00000000, 0x80000000, 0x00000001, 0x7F7FFFFF, 0x7F800000, 0xFF800000, 0x7FC00000, 0x7FC00001]
ODD += [0xFFFFFFFF, 0x7F800001, 0x3F800000]
FLOATS = b"\xff"  #: the first byte of a difference of words

_words = st.integers(0, 2**32 - 1) | st.sampled_from(ODD)
pairs = st.lists(st.tuples(_words, _words), max_size=40).map(
    lambda both: (packed([a for a, _ in both]), packed([b for _, b in both]))
)


def packed(words: list[int]) -> bytes:
    return struct.pack(f"<{len(words)}I", *words)


def planes_number_by_number(base: bytes, new: bytes) -> bytes:
    """What docs/protocol.md says is compressed, from Python's own integers."""
    zigzags = []
    for (old,), (word,) in zip(struct.iter_unpack("<I", base), struct.iter_unpack("<I", new), strict=True):
        d = (word - old) % 2**32
        signed = d - 2**32 if d >= 2**31 else d
        zigzags.append(2 * signed if signed >= 0 else -2 * signed - 1)
    return bytes(z >> shift & 0xFF for shift in (24, 16, 8, 0) for z in zigzags)


@given(pairs)
@example((b"", b""))
@example((packed(ODD), packed(ODD[::-1])))
@quick
def test_a_difference_gives_back_every_bit(pair: tuple[bytes, bytes]) -> None:
    base, new = pair
    assert decode_difference(base, encode_difference(base, new)) == new


@given(pairs)
@example((packed([0]), packed([2**31])))
@quick
def test_what_is_compressed_is_what_the_protocol_says(pair: tuple[bytes, bytes]) -> None:
    base, new = pair
    planes = planes_number_by_number(base, new)
    assert decode_difference(base, FLOATS + zlib.compress(planes, 1)) == new, "any coder's stream is read"
    coded = encode_difference(base, new)
    if coded[:1] == FLOATS:
        assert zlib.decompress(coded[1:]) == planes


def test_the_golden_difference_is_read() -> None:
    golden = bytes.fromhex((Path(__file__).parent / "golden" / "difference.hex").read_text())
    base = np.array([0.5, -0.25, 1.0], "<f4").tobytes()
    assert decode_difference(base, golden) == packed([0x3F000000, 0xBE800103, 0x3F7FFFFE])


def test_factors_that_did_not_move_cost_next_to_nothing() -> None:
    rng = np.random.default_rng(0)
    theta = rng.normal(size=50_000).astype("<f4")
    moved = theta.copy()
    moved[10_000:12_000] += rng.normal(scale=1e-3, size=2000).astype("<f4")
    all_moved = theta + rng.normal(scale=1e-3, size=theta.size).astype("<f4")
    assert len(encode_difference(theta.tobytes(), theta.tobytes())) < 300  # of 200,000
    assert len(encode_difference(theta.tobytes(), moved.tobytes())) < 4 * 2000
    assert len(encode_difference(theta.tobytes(), all_moved.tobytes())) < 0.75 * 4 * theta.size


def test_unlike_versions_cost_hardly_more_than_the_whole() -> None:
    base, new = (np.random.default_rng(seed).bytes(200_000) for seed in (1, 2))
    assert len(encode_difference(base, new)) < len(new) + 200


@pytest.mark.parametrize(("base", "new"), [(b"", bytes(4)), (bytes(8), bytes(4)), (bytes(6), bytes(6))])
def test_vectors_of_unlike_size_have_no_difference(base: bytes, new: bytes) -> None:
    with pytest.raises(LayoutError):
        encode_difference(base, new)


def test_a_base_that_is_no_vector_is_refused() -> None:
    with pytest.raises(LayoutError, match="6 bytes are no float32 vector"):
        decode_difference(bytes(6), encode_difference(bytes(8), bytes(8)))


@given(st.binary(max_size=200), st.integers(0, 10))
@quick
def test_any_bytes_are_a_difference_or_a_wire_error(data: bytes, size: int) -> None:
    for stream in (data, *(bytes([places]) + zlib.compress(data) for places in (0, 7, 24, 25, 255))):
        with contextlib.suppress(WireError):
            assert len(decode_difference(bytes(4 * size), stream)) == 4 * size


BASE, NEW = (np.random.default_rng(seed).bytes(400) for seed in (1, 2))
CODED = encode_difference(BASE, NEW)


@given(st.integers(0, len(CODED) - 1))
@quick
def test_a_difference_that_is_cut_short_is_refused(end: int) -> None:
    with pytest.raises(WireError):
        decode_difference(BASE, CODED[:end])


@given(st.integers(0, 8 * len(CODED) - 1))
@quick
def test_a_flipped_bit_is_refused_or_changes_nothing(bit: int) -> None:
    damaged = bytearray(CODED)
    damaged[bit // 8] ^= 1 << bit % 8
    with contextlib.suppress(WireError):
        assert decode_difference(BASE, bytes(damaged)) == NEW


@pytest.mark.parametrize("tail", [b"\0", CODED])
def test_bytes_after_the_end_are_refused(tail: bytes) -> None:
    with pytest.raises(WireError, match="exactly 400 bytes"):
        decode_difference(BASE, CODED + tail)


@pytest.mark.parametrize("base", [b"", BASE])
def test_a_stream_that_unpacks_to_gigabytes_is_not_unpacked(base: bytes) -> None:
    deflate = zlib.compressobj(9)
    bomb = b"".join([*(deflate.compress(bytes(1 << 24)) for _ in range(16)), deflate.flush()])
    tracemalloc.start()
    try:
        with pytest.raises(WireError, match=f"exactly {len(base)} bytes"):
            decode_difference(base, FLOATS + bomb)
        assert tracemalloc.get_traced_memory()[1] < 1 << 21
    finally:
        tracemalloc.stop()


def test_a_stream_that_wants_a_dictionary_is_refused() -> None:
    deflate = zlib.compressobj(zdict=b"a dictionary")
    with pytest.raises(WireError, match="not a zlib stream"):
        decode_difference(BASE, FLOATS + deflate.compress(bytes(400)) + deflate.flush())


places = st.integers(0, 24)


@given(places, st.lists(st.tuples(st.integers(-(2**20), 2**20), st.integers(-(2**20), 2**20)), max_size=40))
@quick
def test_multiples_of_a_power_of_two_come_back_and_are_subtracted_as_integers(
    places: int, multiples: list[tuple[int, int]]
) -> None:
    base, new = (np.ldexp([float(m[i]) for m in multiples], -places).astype("<f4") for i in (0, 1))
    coded = encode_difference(base.tobytes(), new.tobytes())
    assert decode_difference(base.tobytes(), coded) == new.tobytes()
    assert coded[0] <= places
    zigzags = [
        2 * d if d >= 0 else -2 * d - 1 for a, b in multiples for d in [(b - a) >> (places - coded[0])]
    ]
    expected = bytes(z >> shift & 0xFF for shift in (24, 16, 8, 0) for z in zigzags)
    assert zlib.decompress(coded[1:]) == expected


def test_versions_of_few_binary_places_differ_by_little() -> None:
    rng = np.random.default_rng(0)
    exact = rng.normal(scale=0.3, size=20_000)
    moved = exact + rng.normal(scale=0.03, size=exact.size)
    base, new = ((np.rint(v * 128) / 128 + 0.0).astype("<f4").tobytes() for v in (exact, moved))
    assert len(encode_difference(base, new)) < 0.18 * len(new)
    assert len(encode_difference(bytes(len(new)), new)) < 0.25 * len(new), "who holds nothing holds zeros"


@pytest.mark.parametrize("number", [-0.0, np.nan, np.inf, 2.0**31, 0.1, 2.0**-25])
def test_numbers_that_are_no_multiples_travel_as_words(number: float) -> None:
    base, new = np.zeros(3, "<f4").tobytes(), np.array([0.5, number, 1], "<f4").tobytes()
    coded = encode_difference(base, new)
    assert coded[:1] == FLOATS
    assert decode_difference(base, coded) == new


def test_a_difference_in_multiples_from_a_version_that_is_none_is_refused() -> None:
    held, coded = (
        np.array([0.3], "<f4").tobytes(),
        encode_difference(bytes(4), np.array([0.5], "<f4").tobytes()),
    )
    assert coded[0] == 1
    with pytest.raises(WireError, match="of 1 binary places, the one held is not"):
        decode_difference(held, coded)
