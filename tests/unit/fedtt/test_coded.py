from __future__ import annotations

import itertools
import math
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtt.codec import CodecSpec, check_size, coded, decode_delta, encode_delta, payload_bytes
from fedtt.codec.range_coder import Decoder, Encoder
from fedtt.codec.sparsify import largest
from fedtt.errors import WireError
from fedtt.layout import Factor, FactorLayout

quick = settings(deadline=None, max_examples=100)
_LAYOUT = FactorLayout([Factor("a", (40, 50)), Factor("b", (7,))])
LIVE = _LAYOUT.everything
RMS = CodecSpec(quantise="rms", coding="range")

#: decisions: (context, bit), or (None, value, bits) for raw ones
decisions = st.lists(
    st.tuples(st.integers(0, 3), st.booleans())
    | st.integers(1, 20).flatmap(
        lambda bits: st.tuples(st.none(), st.integers(0, 2**bits - 1), st.just(bits))
    )
)


def coded_as(made: list[tuple[int | None, ...]]) -> bytes:
    coder = Encoder(4)
    for context, value, *bits in made:
        if context is None:
            coder.raw(value or 0, bits[0] or 0)
        else:
            coder.bit(context, int(value or 0))
    return coder.finish()


def decoded(data: bytes, made: list[tuple[int | None, ...]]) -> list[int]:
    coder = Decoder(data, 4)
    values = [coder.bit(c) if c is not None else coder.raw(bits[0] or 0) for c, _, *bits in made]
    coder.finish()
    return values


@given(decisions)
@quick
def test_decisions_come_back_as_they_were_coded(made: list[tuple[int | None, ...]]) -> None:
    assert decoded(coded_as(made), made) == [int(value or 0) for _, value, *_ in made]


@pytest.mark.parametrize("first", [0, 1])
def test_carries_pass_through_bytes_already_out(first: int) -> None:
    """Long runs at the upper end of the interval, where a carry ripples through bytes of 255."""
    rng = np.random.default_rng(3)
    for _ in range(200):
        raw = [(None, int(v), 8) for v in rng.choice([0xFF, 0xFF, 0xFE, 0], 12)]
        made: list[tuple[int | None, ...]] = [(0, first), *raw, (0, 1), (0, 0)]
        assert decoded(coded_as(made), made) == [int(value or 0) for _, value, *_ in made]


@pytest.mark.parametrize("chance", [0.5, 0.2, 0.05, 0.01])
def test_a_biased_stream_takes_about_its_entropy(chance: float) -> None:
    n = 20_000
    bits = np.random.default_rng(1).random(n) < chance
    entropy = -n * (chance * math.log2(chance) + (1 - chance) * math.log2(1 - chance)) / 8
    size = len(coded_as([(0, int(bit)) for bit in bits]))
    assert entropy - 1 < size < 1.08 * entropy + 8  # going on learning costs a few per cent


@pytest.mark.parametrize("tail", [b"\0", b"\0\0\0\0\1"])
def test_a_stream_with_bytes_that_nothing_came_from_is_refused(tail: bytes) -> None:
    coder = Decoder(coded_as([(0, 1), (None, 5, 3)]) + tail, 4)
    assert (coder.bit(0), coder.raw(3)) == (1, 5)
    with pytest.raises(WireError, match="goes on past its end"):
        coder.finish()


@given(st.data())
@quick
def test_integers_and_scales_come_back_whatever_they_are(data: st.DataObject) -> None:
    levels, scale_bits = data.draw(st.sampled_from([(1, 16), (3, 16), (7, 16), (127, 12)]))
    words = st.integers(0, 2 ** (scale_bits - 1) - 1).map(lambda w: w << (16 - scale_bits))
    numbers = st.lists(st.integers(-levels, levels), max_size=30)
    blocks = [
        (np.array(q, np.int8) if word else np.zeros(len(q), np.int8), word)
        for q, word in data.draw(st.lists(st.tuples(numbers, words), max_size=4))
    ]
    stream = coded.encode(levels, scale_bits, blocks)
    found = coded.decode(levels, scale_bits, stream, [(1, q.size) for q, _ in blocks])
    for (q, word), (q2, word2) in itertools.zip_longest(blocks, found):
        np.testing.assert_array_equal(q[None, None], q2)
        assert word2.tolist() == [[[word]]]


def laplace(seed: int) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
    return np.random.default_rng(seed).laplace(0, 0.03, LIVE.size).astype(np.float32)


@pytest.mark.parametrize("quantise", ["int4", "int3", "int2", "ternary", "int8"])
def test_coding_loses_nothing_and_gains_on_what_is_uneven(quantise: str) -> None:
    plain = CodecSpec(quantise=quantise)  # type: ignore[arg-type]
    short = CodecSpec(quantise=quantise, coding="range")  # type: ignore[arg-type]
    delta, rng = laplace(1), np.random.default_rng(0)
    packed, payload = encode_delta(plain, LIVE, delta, rng), encode_delta(short, LIVE, delta, rng)
    np.testing.assert_array_equal(decode_delta(plain, LIVE, packed), decode_delta(short, LIVE, payload))
    assert len(payload) < 0.9 * len(packed)


def test_coded_integers_stay_near_their_entropy() -> None:
    payload = encode_delta(RMS, LIVE, laplace(2), np.random.default_rng(0))
    delta = decode_delta(RMS, LIVE, payload)[:2000]
    _, counts = np.unique(delta, return_counts=True)
    entropy = -(counts * np.log2(counts / counts.sum())).sum() / 8
    assert len(payload) < 1.05 * entropy + 16


def test_what_coding_would_lengthen_travels_plain() -> None:
    """One byte tells which, so the bound is the plain size and that byte."""
    codec, rng = CodecSpec(quantise="int8", coding="range"), np.random.default_rng(0)
    delta = rng.choice([-1, 1], LIVE.size).astype(np.float32) * rng.choice([1.0, 0.6], LIVE.size)
    noise = rng.uniform(0.5, 1, LIVE.size) * np.sign(delta)
    payload = encode_delta(codec, LIVE, noise.astype(np.float32), rng)
    assert len(payload) <= payload_bytes(codec, LIVE)
    tiny = FactorLayout([Factor("a", (1,))]).everything
    payload = encode_delta(codec, tiny, np.array([3e30], np.float32), rng)
    assert payload[0] == 0
    assert len(payload) == payload_bytes(codec, tiny) == 4  # which, two bytes of scale, one integer
    np.testing.assert_allclose(decode_delta(codec, tiny, payload), [3e30], rtol=1e-2)


def test_a_step_of_root_mean_squares_is_as_wide_as_it_says() -> None:
    delta = laplace(3)
    for step in (0.25, 1.0, 2.0):
        codec = CodecSpec(quantise="rms", step=step, coding="range")
        found = decode_delta(codec, LIVE, encode_delta(codec, LIVE, delta, np.random.default_rng(0)))[:2000]
        width = np.unique(np.abs(found))[1]
        rms = float(np.sqrt(np.mean(delta[:2000].astype(np.float64) ** 2)))
        assert step * rms <= width <= 1.126 * step * rms  # three bits of mantissa, rounded up


def test_a_sign_is_one_bit_and_its_size_the_mean_of_what_is_not_zero() -> None:
    delta = laplace(5)
    delta[::2] = 0
    codec = CodecSpec(quantise="sign", coding="range")
    found = decode_delta(codec, LIVE, encode_delta(codec, LIVE, delta, np.random.default_rng(0)))
    np.testing.assert_array_equal(np.sign(found), np.sign(delta))
    for part, came in ((found[:2000], delta[:2000]), (found[2000:], delta[2000:])):
        mean = np.abs(came[came != 0].astype(np.float64)).mean()
        assert mean <= np.abs(part).max() <= 1.126 * mean  # three bits of mantissa, rounded up
    dense = laplace(5)
    payload = encode_delta(codec, LIVE, dense, np.random.default_rng(0))
    assert len(payload) <= 1 + 2007 / 8 + 8  # which, 2,007 signs, two scales and what contexts learn


def test_top_k_keeps_the_largest_of_all_factors_and_a_threshold_the_large() -> None:
    delta = np.array([3, -1, 0, 5, -4, 4], np.float32)
    np.testing.assert_array_equal(largest(delta, 0.5, 0), [0, 0, 0, 5, -4, 4])  # 3 of 6
    np.testing.assert_array_equal(largest(delta, 0.3, 0), [0, 0, 0, 5, -4, 0])  # ⌈1.8⌉, the first of equals
    rms = math.sqrt(67 / 6)  # 3.34
    np.testing.assert_array_equal(largest(delta, 1, 4.1 / rms), [0, 0, 0, 5, 0, 0])
    np.testing.assert_array_equal(largest(delta, 1, 8), [0, 0, 0, 5, 0, 0])  # the largest always stays


def test_fewer_numbers_kept_are_fewer_bytes() -> None:
    rng = np.random.default_rng(0)
    sizes = [
        len(encode_delta(CodecSpec(quantise="int4", keep=keep, coding="range"), LIVE, laplace(4), rng))
        for keep in (1.0, 0.25, 0.05, 0.01)
    ]
    assert sizes == sorted(sizes, reverse=True)
    # 20 of 2,007 take 20 (log2(100) + log2 e) bits for their places and 4 each for themselves, 27 bytes
    assert sizes[-1] < 45


@pytest.mark.parametrize(
    ("payload", "complaint"),
    [
        (b"", "neither coded nor plain"),
        (b"\2" + bytes(5), "neither coded nor plain"),
        (b"\0" + bytes(5), "neither coded nor plain"),
        (b"\1" + b"\xff" * 2000, "scale is negative|past its end"),
    ],
)
def test_payloads_that_no_encoder_writes_are_refused(payload: bytes, complaint: str) -> None:
    with pytest.raises(WireError, match=complaint):
        decode_delta(RMS, LIVE, payload)


def test_a_coded_payload_past_the_plain_size_is_refused_unread() -> None:
    most = payload_bytes(RMS, LIVE)
    check_size(RMS, LIVE, most)
    with pytest.raises(WireError, match=f"has {most + 1} bytes, this layout and codec need at most {most}"):
        check_size(RMS, LIVE, most + 1)


def test_golden_coded_payloads() -> None:
    """The bytes that docs/protocol.md shows, for other languages."""
    document = (Path(__file__).parents[3] / "docs" / "protocol.md").read_text()
    live = FactorLayout([Factor("a", (24,))]).everything
    delta = np.array([0.5, -0.25, 1, 0, 0, 0, 0.75, 0, -1, 0, 0, 0.25, *[0] * 12], np.float32)
    rng = np.random.default_rng(0)
    for name in ("int4", "ternary", "sign", "rms"):
        codec = CodecSpec(quantise=name, coding="range")
        shown = encode_delta(codec, live, delta, rng).hex(" ")
        assert re.search(rf"`{name}`[^\n]*`{shown}`", document), (name, shown)
