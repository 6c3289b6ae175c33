"""An update is checked for what its task asked for before it is acknowledged."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest

from aggregator.update_check import Estimate, Wanted, check_update, check_updates
from fedtt.codec import CodecSpec, decode_delta, encode_delta, payload_bytes
from fedtt.label_counts import decode_label_counts
from fedtt.label_estimate import estimated_label_counts, estimated_shares
from fedtt.layout import LiveSet
from fedtt.messages import Code, Problem
from fedtt.optimiser import TrainingSpec
from fedtt.wire import UpdateHeader, encode_update, layout_tag
from tests.support.tiny import tiny_spec

LAYOUT = tiny_spec().layout
LIVE = tuple(range(len(LAYOUT.everything.indices)))
HEADER = UpdateHeader(layout=layout_tag(LAYOUT), examples=3, steps=2, loss_first=1.0, loss_last=0.5)


def payload_of(codec: CodecSpec, live: tuple[int, ...] = LIVE) -> bytes:
    chosen = LiveSet(LAYOUT, live)
    delta = np.linspace(-1, 1, chosen.size, dtype=np.float32)
    return encode_delta(codec, chosen, delta, np.random.default_rng(0))


def problem_of(payload: bytes, codec: CodecSpec, live: tuple[int, ...] = LIVE) -> Problem:
    answer = check_update(encode_update(HEADER, payload), Wanted(LAYOUT, live, codec))
    assert isinstance(answer, Problem)
    return answer


@pytest.mark.parametrize("quantise", ["fp32", "int8", "int4"])
def test_a_sound_update_comes_back_as_header_and_payload(quantise: str) -> None:
    codec = CodecSpec(quantise=quantise)  # type: ignore[arg-type]
    payload = payload_of(codec)
    assert check_update(encode_update(HEADER, payload), Wanted(LAYOUT, LIVE, codec)) == (HEADER, payload)


def test_the_payload_of_another_live_set_is_for_another_layout() -> None:
    codec = CodecSpec(quantise="int8")
    found = problem_of(payload_of(codec), codec, LIVE[:2])
    assert found.code is Code.WRONG_LAYOUT
    assert f"need {payload_bytes(codec, LiveSet(LAYOUT, LIVE[:2]))}" in found.detail


def test_an_update_of_another_layout_is_told_so() -> None:
    header = msgspec.structs.replace(HEADER, layout=bytes(8))
    codec = CodecSpec(quantise="int8")
    answer = check_update(encode_update(header, payload_of(codec)), Wanted(LAYOUT, LIVE, codec))
    assert isinstance(answer, Problem)
    assert answer.code is Code.WRONG_LAYOUT
    assert answer.detail.startswith(f"the update is for layout {'00' * 8}, the lease's plan needs ")


def test_a_coded_update_is_sound_up_to_the_plain_size() -> None:
    codec = CodecSpec(quantise="int4", coding="range")
    payload = payload_of(codec)
    assert len(payload) < payload_bytes(codec, LiveSet(LAYOUT, LIVE))
    assert check_update(encode_update(HEADER, payload), Wanted(LAYOUT, LIVE, codec)) == (HEADER, payload)
    assert problem_of(payload + bytes(5000), codec).code is Code.WRONG_LAYOUT


@pytest.mark.parametrize("quantise", ["int8", "int4"])
@pytest.mark.parametrize("scale", [b"\x80\x7f", b"\xc0\x7f", b"\x7f\x7f"])  # inf, NaN, the greatest bfloat16
def test_a_scale_that_makes_a_factor_infinite_is_refused(quantise: str, scale: bytes) -> None:
    codec = CodecSpec(quantise=quantise)  # type: ignore[arg-type]
    assert problem_of(scale + payload_of(codec)[2:], codec).code is Code.NOT_FINITE


def test_integers_that_no_encoder_writes_are_refused() -> None:
    codec = CodecSpec(quantise="int8")
    payload = bytearray(payload_of(codec))
    payload[2] = 0x80  # -128
    found = problem_of(bytes(payload), codec)
    assert "-128, which 8-bit values never take" in found.detail


def test_many_updates_of_several_plans_are_each_judged_as_alone() -> None:
    plans = [
        Wanted(LAYOUT, live, CodecSpec(quantise=quantise))
        for live in (LIVE, LIVE[:2])
        for quantise in ("fp32", "int8", "int4")
    ]
    frames = [
        (encode_update(HEADER, payload_of(plan.codec, plan.live)), plan) for plan in plans for _ in range(4)
    ]
    for bad, (frame, plan) in enumerate(list(frames[::4])):
        numbers = {"fp32": b"\x00\x00\xc0\x7f", "int8": b"\xc0\x7f", "int4": b"\xc0\x7f"}[plan.codec.quantise]
        payload = payload_of(plan.codec, plan.live)
        frames[4 * bad] = (encode_update(HEADER, numbers + payload[len(numbers) :]), plan)
        frames[4 * bad + 1] = (frame[:-1], plan)
    found = check_updates(frames)
    assert found == [check_update(*frame) for frame in frames]
    assert [getattr(one, "code", None) for one in found] == [Code.NOT_FINITE, Code.MALFORMED, None, None] * 6


@pytest.mark.parametrize(
    "codec",
    [CodecSpec(quantise="fp32"), CodecSpec(quantise="int4"), CodecSpec(quantise="sign", coding="range")],
    ids=["fp32", "int4", "sign"],
)
def test_counts_of_labels_are_estimated_from_the_bias_as_it_was_sent(codec: CodecSpec) -> None:
    head = tiny_spec().head
    assert head is not None
    assert LAYOUT.factors[-1].name == "head.bias"
    training = TrainingSpec(learning_rate=0.7)
    header = msgspec.structs.replace(HEADER, examples=70_000)
    payload = payload_of(codec)
    wanted = Wanted(LAYOUT, LIVE, codec, estimate=Estimate(head.labels, training))
    (found,) = check_updates([(encode_update(header, payload), wanted)])
    assert found == check_update(encode_update(header, payload), wanted)
    assert not isinstance(found, Problem)
    bias = decode_delta(codec, LAYOUT.everything, payload)[LAYOUT.slices[-1]]
    expected = estimated_label_counts(estimated_shares(bias, training, header.steps), 2**15 - 1)
    counts = decode_label_counts(found[0].label_counts, head.labels)
    np.testing.assert_array_equal(counts, expected)
    assert (msgspec.structs.replace(found[0], label_counts=b""), found[1]) == (header, payload)


def test_a_device_tells_no_counts_where_they_are_estimated() -> None:
    codec = CodecSpec(quantise="fp32")
    header = msgspec.structs.replace(HEADER, label_counts=bytes(4))
    wanted = Wanted(LAYOUT, LIVE, codec, estimate=Estimate(2, TrainingSpec()))
    found = check_update(encode_update(header, payload_of(codec)), wanted)
    assert isinstance(found, Problem)
    assert found.code is Code.MALFORMED
