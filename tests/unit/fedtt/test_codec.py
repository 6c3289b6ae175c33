from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from fedtt.codec import (
    CodecSpec,
    check_deltas,
    compensate,
    decode_delta,
    decode_deltas,
    encode_delta,
    payload_bytes,
)
from fedtt.errors import ConfigError, LayoutError, WireError
from fedtt.layout import Factor, FactorLayout, LiveSet
from tests.support.codecs import CODED, PLAIN

Delta = NDArray[np.float32]
quick = settings(deadline=None, max_examples=60)

_LAYOUT = FactorLayout([Factor("a", (1, 3, 1)), Factor("b", (2, 2, 2)), Factor("c", (2,)), Factor("d", (5,))])
LIVE = LiveSet(_LAYOUT, [0, 1, 3])  # 3 + 8 + 5 = 16 numbers
FP32 = CodecSpec(quantise="fp32")
INT8, INT4 = CodecSpec(quantise="int8"), CodecSpec(quantise="int4")
WHOLE = [CodecSpec(quantise=bits) for bits in ("int3", "int2")]
STOCHASTIC = [
    CodecSpec(quantise=b, rounding="stochastic") for b in ("int8", "int4", "int3", "int2", "ternary")
]
EVERY = [*PLAIN, *CODED]
NEAREST = [c for c in EVERY if c.rounding == "nearest" and c.quantise != "fp32"]
TERNARY = CodecSpec(quantise="ternary")
SIGN = CodecSpec(quantise="sign", coding="range")

_value = st.floats(-(2.0**100), 2.0**100, width=32)
deltas = st.lists(_value, min_size=16, max_size=16).map(lambda v: np.array(v, np.float32))


def encode(codec: CodecSpec, delta: Delta, seed: int = 0) -> bytes:
    return encode_delta(codec, LIVE, delta, np.random.default_rng(seed))


def scales(codec: CodecSpec, payload: bytes) -> Delta:
    """The scale that stands before each factor, spread over its numbers, (live.size,)."""
    spread, start = [], 0
    bits = codec.levels.bit_length() + 1
    for size in LIVE.sizes:
        word = int.from_bytes(payload[start : start + 2], "little") << 16
        spread += [np.uint32(word).view(np.float32)] * size
        start += 2 + (size * bits + 7) // 8
    return np.array(spread, np.float32)


def largest(delta: Delta) -> Delta:
    """The largest magnitude of each factor, spread over its numbers, (live.size,)."""
    parts = np.split(np.abs(delta), np.cumsum(LIVE.sizes)[:-1])
    return np.concatenate([np.full(part.size, part.max()) for part in parts])


@given(deltas)
@quick
def test_fp32_is_lossless(delta: Delta) -> None:
    np.testing.assert_array_equal(decode_delta(FP32, LIVE, encode(FP32, delta)), delta)


@pytest.mark.parametrize("codec", [INT8, INT4, *WHOLE])
@given(delta=deltas)
@quick
def test_rounding_to_nearest_errs_by_at_most_half_a_step(codec: CodecSpec, delta: Delta) -> None:
    payload = encode(codec, delta)
    step = scales(codec, payload).astype(np.float64)
    error = np.abs(decode_delta(codec, LIVE, payload).astype(np.float64) - delta)
    assert (error <= step * (0.5 + 1e-6)).all()


@pytest.mark.parametrize("codec", STOCHASTIC)
@given(delta=deltas, seed=st.integers(0, 2**32))
@quick
def test_stochastic_rounding_errs_by_less_than_a_step(codec: CodecSpec, delta: Delta, seed: int) -> None:
    payload = encode(codec, delta, seed)
    step = scales(codec, payload).astype(np.float64)
    error = np.abs(decode_delta(codec, LIVE, payload).astype(np.float64) - delta)
    assert (error <= step * (1 + 1e-6)).all()


@pytest.mark.parametrize("codec", [INT8, INT4, *WHOLE, *STOCHASTIC])
@given(delta=deltas)
@quick
def test_the_scale_is_rounded_up_so_that_the_largest_number_is_never_clipped(
    codec: CodecSpec, delta: Delta
) -> None:
    levels = codec.levels
    step = scales(codec, encode(codec, delta)).astype(np.float64)
    assert (step * levels >= largest(delta) * (1 - 1e-12)).all()
    spacing = 2.0**-133  # of the smallest bfloat16, where the relative bound ends
    assert (step <= largest(delta) / levels * (1 + 2**-7) + spacing).all()


@pytest.mark.parametrize("codec", STOCHASTIC)
def test_stochastic_rounding_is_right_in_the_mean(codec: CodecSpec) -> None:
    delta = np.random.default_rng(5).standard_normal(LIVE.size).astype(np.float32)
    draws, rng = 3000, np.random.default_rng(6)
    decoded = [decode_delta(codec, LIVE, encode_delta(codec, LIVE, delta, rng)) for _ in range(draws)]
    step = scales(codec, encode(codec, delta))
    # a number between two steps has variance at most step²/4, the mean of n draws step²/4n
    assert (np.abs(np.mean(decoded, axis=0) - delta) <= 4.5 * step / 2 / np.sqrt(draws)).all()
    assert np.std(decoded, axis=0).max() > 0


@pytest.mark.parametrize("codec", [INT8, INT4])
def test_rounding_to_nearest_draws_nothing(codec: CodecSpec) -> None:
    rng = np.random.default_rng(1)
    encode_delta(codec, LIVE, np.ones(16, np.float32), rng)
    assert rng.random() == np.random.default_rng(1).random()


@pytest.mark.parametrize("codec", EVERY)
def test_a_zero_delta_stays_zero(codec: CodecSpec) -> None:
    payload = encode(codec, np.zeros(16, np.float32))
    assert codec.coding == "range" or not any(payload)
    assert not decode_delta(codec, LIVE, payload).any()


@given(delta=deltas.filter(lambda delta: np.abs(delta).max() > 2.0**-100))  # far from the last bfloat16
@pytest.mark.parametrize("codec", NEAREST)
@quick
def test_what_nearest_rounding_leaves_is_shorter_than_what_came(codec: CodecSpec, delta: Delta) -> None:
    _, residual = compensate(codec, LIVE, delta, np.zeros_like(delta))
    assert np.linalg.norm(residual.astype(np.float64)) < np.linalg.norm(delta.astype(np.float64))


@pytest.mark.parametrize(
    ("codec", "most"),  # of a contraction by c no more than c / (1 - c) deltas are left: sign has c = 0.6
    [
        (INT8, 1),
        (INT4, 1),
        (TERNARY, 1),
        (SIGN, 1.6),
        (CodecSpec(quantise="rms", step=0.5, coding="range"), 1),
    ],
)
def test_with_error_feedback_what_was_sent_and_what_is_kept_sum_to_all_deltas(
    codec: CodecSpec, most: float
) -> None:
    rng = np.random.default_rng(7)
    trained = sent = np.zeros(LIVE.size)
    residual = np.zeros(LIVE.size, np.float32)
    for _ in range(50):
        delta = rng.standard_normal(LIVE.size).astype(np.float32)
        payload, residual = compensate(codec, LIVE, delta, residual)
        trained, sent = trained + delta, sent + decode_delta(codec, LIVE, payload)
        assert np.linalg.norm(residual) < most * np.linalg.norm(delta)
    np.testing.assert_allclose(sent + residual, trained, atol=1e-4)
    assert np.abs(sent - trained).max() > 1e-4  # the residual was needed


@pytest.mark.parametrize(
    ("codec", "expected"),
    [
        (FP32, 64),  # 4·(3 + 8 + 5)
        (INT8, 22),  # (2 + 3) + (2 + 8) + (2 + 5)
        (INT4, 15),  # (2 + 2) + (2 + 4) + (2 + 3): odd factors pad half a byte
        (CodecSpec(quantise="int3"), 13),  # (2 + ⌈9/8⌉) + (2 + 3) + (2 + ⌈15/8⌉)
        (TERNARY, 11),  # (2 + 1) + (2 + 2) + (2 + ⌈10/8⌉)
        (CodecSpec(quantise="int8", block=4), 26),  # (2 + 3) + (2 + 4)·2 + (2 + 4) + (2 + 1)
    ],
)
def test_payload_sizes_are_exact(codec: CodecSpec, expected: int) -> None:
    assert payload_bytes(codec, LIVE) == expected
    assert len(encode(codec, np.ones(16, np.float32))) == expected


@pytest.mark.parametrize("codec", EVERY)
@given(data=st.data())
@quick
def test_any_bytes_give_finite_numbers_or_a_wire_error(codec: CodecSpec, data: st.DataObject) -> None:
    size = payload_bytes(codec, LIVE)
    coded = st.binary(max_size=size).map(lambda data: b"\1" + data)
    payload = data.draw(st.binary(max_size=size + 2) | st.binary(min_size=size, max_size=size) | coded)
    try:
        delta = decode_delta(codec, LIVE, payload)
    except WireError:
        return
    assert len(payload) == size or (codec.coding == "range" and len(payload) < size)
    assert delta.shape == (16,)
    assert np.isfinite(delta).all()


def with_byte(payload: bytes, at: int, value: int) -> bytes:
    return payload[:at] + bytes([value]) + payload[at + 1 :]


@pytest.mark.parametrize(
    ("codec", "at", "value", "complaint"),
    [
        (INT8, 2, 0x80, "-128, which 8-bit values never take"),
        (INT4, 2, 0x08, "-8, which 4-bit values never take"),
        (INT4, 2, 0x80, "-8, which 4-bit values never take"),
        (INT4, 3, 0x17, "padding is not zero"),  # the first factor's third number and half a byte
        (INT8, 1, 0xBF, "scale is negative"),
        (INT4, 1, 0x80, "scale is negative"),
    ],
)
def test_a_payload_with_integers_no_encoder_writes_is_refused(
    codec: CodecSpec, at: int, value: int, complaint: str
) -> None:
    payload = encode(codec, np.ones(16, np.float32))
    with pytest.raises(WireError, match=complaint):
        decode_delta(codec, LIVE, with_byte(payload, at, value))


@pytest.mark.parametrize(
    ("codec", "payload"),
    [
        (FP32, np.full(16, np.nan, "<f4").tobytes()),
        (FP32, np.full(16, -np.inf, "<f4").tobytes()),
        (INT8, b"\x80\x7f\x01" + bytes(19)),  # scale +inf
        (INT8, b"\x80\x7f" + bytes(20)),  # inf · 0
        (INT4, b"\xc0\x7f\x01" + bytes(12)),  # scale NaN
        (INT8, b"\x7f\x7f\x7f" + bytes(19)),  # 3.4e38 · 127 overflows
    ],
)
def test_numbers_that_are_not_finite_are_refused_when_decoded(codec: CodecSpec, payload: bytes) -> None:
    with pytest.raises(WireError, match="NaN or infinite"):
        decode_delta(codec, LIVE, payload)


_UPPER = st.sampled_from([0x00, 0x3C, 0x7A, 0x7B, 0x7C, 0x7E, 0x7F, 0x80, 0xFF])  # of scales, some not finite


@given(codec=st.sampled_from(PLAIN), upper=_UPPER, lower=st.integers(0, 255), data=st.data())
@settings(deadline=None, max_examples=300)
def test_a_check_refuses_exactly_what_decoding_refuses(
    codec: CodecSpec, upper: int, lower: int, data: st.DataObject
) -> None:
    size = payload_bytes(codec, LIVE)
    given_ = data.draw(st.binary(min_size=size, max_size=size))
    payloads = [encode(codec, np.ones(16, np.float32)), bytes([lower, upper]) + given_[2:]]
    try:
        decode_deltas(codec, LIVE, payloads)
    except WireError as error:
        with pytest.raises(WireError, match=re.escape(str(error))):
            check_deltas(codec, LIVE, payloads)
    else:
        check_deltas(codec, LIVE, payloads)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("codec", EVERY)
def test_numbers_that_are_not_finite_are_refused_when_encoded(codec: CodecSpec, bad: float) -> None:
    delta = np.ones(16, np.float32)
    delta[9] = bad
    with pytest.raises(WireError, match="not finite: training diverged; lower the learning rate"):
        encode(codec, delta)


def test_a_delta_or_payload_of_another_size_is_refused_with_both_numbers() -> None:
    with pytest.raises(LayoutError, match=r"expected 16 live numbers, got shape \(15,\)"):
        encode(INT8, np.ones(15, np.float32))
    with pytest.raises(WireError, match="has 21 bytes, this layout and codec need 22"):
        decode_delta(INT8, LIVE, bytes(21))


@pytest.mark.parametrize(
    ("settings_", "complaint"),
    [
        ({"error_feedback": True, "rounding": "stochastic"}, "error_feedback = True .*nearest"),
        ({"error_feedback": True, "quantise": "fp32"}, "error_feedback = True .*a quantiser"),
        ({"quantise": "int4", "step": 2.0}, "step = 2.0 .*quantise = 'rms'"),
        ({"quantise": "fp32", "coding": "range"}, "coding = 'range' .*'plain'"),
        ({"quantise": "rms"}, "quantise = 'rms' .*coding = 'range'"),
        ({"quantise": "sign"}, "quantise = 'sign' .*coding = 'range'"),
        (
            {"quantise": "sign", "coding": "range", "rounding": "stochastic"},
            "rounding = 'stochastic' .*'nearest'",
        ),
        ({"quantise": "fp32", "block": 64}, "block = 64 .*no scale"),
        ({"keep": 0.5}, "keep = 0.5 .*coding = 'range'"),
        ({"threshold": 0.5}, "threshold = 0.5 .*coding = 'range'"),
    ],
)
def test_stages_that_do_not_go_together_are_refused(settings_: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ConfigError, match=rf"codec\.{complaint}"):
        CodecSpec(**settings_)


def test_golden_payloads() -> None:
    live = FactorLayout([Factor("a", (3,))]).everything
    delta = np.array([0.5, -0.25, 1.0], np.float32)
    rng = np.random.default_rng(0)
    # 1/127 = 0.0078740, the bfloat16 above it is 0x3c02 = 0.0079346; 0.5, -0.25 and 1 are then
    # 63.02, -31.51 and 126.03 steps: 63 = 0x3f, -32 = 0xe0, 126 = 0x7e
    assert encode_delta(INT8, live, delta, rng).hex(" ") == "02 3c 3f e0 7e"
    # 1/7 = 0.142857, the bfloat16 above it is 0x3e13 = 0.143555: 3.48, -1.74 and 6.97 steps: 3, -2 = 0xe, 7
    assert encode_delta(INT4, live, delta, rng).hex(" ") == "13 3e e3 07"
    assert encode_delta(FP32, live, delta, rng).hex(" ", 4) == "0000003f 000080be 0000803f"
    # 1/3, above it 0x3eab = 0.33398: 1.497, -0.749 and 2.994 steps: 1, -1 = 0b111 and 3, the lowest bit first
    assert encode_delta(CodecSpec(quantise="int3"), live, delta, rng).hex(" ") == "ab 3e f9 00"
    # 0.7 · mean|x| = 0.408: 0.5 and 1 lie above, their mean 0.75 = 0x3f40; 0.67, -0.33 and 1.33 steps
    assert encode_delta(TERNARY, live, delta, rng).hex(" ") == "40 3f 11"


@pytest.mark.parametrize("codec", EVERY)
def test_several_updates_decode_together_to_what_each_decodes_to(codec: CodecSpec) -> None:
    moved = np.random.default_rng(3).standard_normal((5, 16), np.float32)
    payloads = [encode(codec, delta, seed) for seed, delta in enumerate(moved)]
    each = np.stack([decode_delta(codec, LIVE, payload) for payload in payloads])
    np.testing.assert_array_equal(decode_deltas(codec, LIVE, payloads), each)


@pytest.mark.parametrize("codec", EVERY)
def test_one_unsound_update_among_several_is_refused(codec: CodecSpec) -> None:
    sound = encode(codec, np.ones(16, np.float32))
    infinite = b"\0\0\x80\x7f" + sound[4:] if codec.quantise == "fp32" else b"\xff\x7f" + sound[2:]
    for unsound in (sound + bytes(100), infinite):
        with pytest.raises(WireError):
            decode_deltas(codec, LIVE, [sound, unsound])
