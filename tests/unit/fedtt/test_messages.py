from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Any, cast

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtt.algorithms import ExactFedTT, FedAvg, FedTT, FedTTPlus
from fedtt.codec import CodecSpec
from fedtt.errors import ForeignWork, WireError
from fedtt.messages import (
    MESSAGE_LIMIT_BYTES,
    STATUS,
    AsTold,
    CheckIn,
    CheckInAnswer,
    Code,
    Enroll,
    Enrolled,
    Failure,
    FailureCode,
    Judge,
    Judged,
    Message,
    Plan,
    Problem,
    Receipt,
    Retired,
    Tell,
    UpdateState,
    Verdict,
    Wait,
    Work,
    decode,
    decode_answer,
    decode_check_in,
    device_id,
    encode,
)
from fedtt.optimiser import TrainingSpec

GOLDEN = Path(__file__).parent / "golden"
ANSWER = cast("type[CheckInAnswer]", CheckInAnswer)
quick = settings(deadline=None, max_examples=25)

WORK = Work(
    lease="0123456789abcdef" * 2,
    expires_in_s=600.0,
    plan=Plan(
        task="assistant",
        seed=7,
        bundle="b" * 64,
        version="c" * 64,
        version_number=3,
        round=5,
        live=(0, 1, 200),
        training=TrainingSpec(),
        codec=CodecSpec(),
        method=FedTT(),
        min_examples=8,
    ),
)

hexes = st.text("0123456789abcdef", min_size=32, max_size=32)
sha256s = st.text("0123456789abcdef", min_size=64, max_size=64)
_characters = st.characters(codec="utf-8")
names = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=100)
texts = st.text(_characters, max_size=500)
counts, seconds = st.integers(0, 2**53), st.floats(0, 1e9)
codecs = st.sampled_from([CodecSpec(), CodecSpec(quantise="int8", error_feedback=True)])
methods = st.sampled_from([FedTT(), FedAvg(), FedTTPlus(), ExactFedTT(orthogonal=True)])
trainings = st.sampled_from([TrainingSpec(), TrainingSpec(optimiser="sgd", max_tokens=32)])
plans = st.builds(
    Plan,
    task=names,
    seed=counts,
    bundle=sha256s,
    version=sha256s,
    version_number=counts,
    round=counts,
    live=st.lists(counts, min_size=1, max_size=20).map(tuple),
    training=trainings,
    codec=codecs,
    method=methods,
    min_examples=counts,
    rank=st.none() | st.integers(1, 4096),
)
judged = st.builds(Judged, loss=st.floats(0, 1e9), right=st.none() | st.integers(0, 1000))
MESSAGES: dict[type[Message], st.SearchStrategy[Any]] = {
    Enroll: st.builds(Enroll, public_key=st.binary(min_size=32, max_size=32), token=names, client=names),
    Enrolled: st.builds(Enrolled, device=hexes),
    CheckIn: st.builds(
        CheckIn,
        client=names,
        runtimes=st.lists(names, max_size=8).map(tuple),
        examples=counts,
        memory_mb=counts,
    ),
    AsTold: st.builds(AsTold, digest=st.binary(min_size=4, max_size=4)),
    Plan: plans,
    Work: st.builds(Work, lease=hexes, expires_in_s=seconds, plan=plans, round_ends_in_s=st.none() | seconds),
    Judge: st.builds(
        Judge,
        lease=hexes,
        expires_in_s=seconds,
        task=names,
        seed=counts,
        bundle=sha256s,
        version=sha256s,
        version_number=counts,
        before=sha256s,
        examples=st.integers(1, 10**9),
    ),
    Verdict: st.builds(Verdict, examples=st.integers(1000, 2**53), before=judged, after=judged),
    Wait: st.builds(Wait, retry_after_s=seconds, reason=texts),
    Retired: st.builds(Retired, reason=texts),
    Tell: st.builds(Tell),
    Failure: st.builds(Failure, code=st.sampled_from(FailureCode), detail=texts),
    Receipt: st.builds(
        Receipt,
        lease=hexes,
        digest=sha256s,
        state=st.sampled_from(UpdateState),
        reason=texts,
        version_number=st.none() | counts,
    ),
    Problem: st.builds(
        Problem,
        code=st.sampled_from(Code),
        detail=texts,
        remedy=texts,
        now=st.none() | st.floats(0, 9e9),
    ),
}
every = pytest.mark.parametrize("kind", list(MESSAGES), ids=lambda kind: kind.__name__)


def fields(message: Message) -> dict[str, Any]:
    return cast("dict[str, Any]", msgspec.msgpack.decode(encode(message)))


def refusal(data: bytes, kind: Any) -> str:
    """The one line with which bytes are refused."""
    with pytest.raises(WireError) as error:
        decode(data, kind)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_there_is_a_round_trip_for_every_message() -> None:
    assert set(MESSAGES) == set(Message.__subclasses__())


@every
@given(data=st.data())
@quick
def test_every_message_comes_back_as_it_went(kind: type[Message], data: st.DataObject) -> None:
    message = data.draw(MESSAGES[kind])
    assert decode(encode(message), kind) == message


@every
@given(data=st.data())
@settings(deadline=None, max_examples=3)
def test_unknown_missing_and_foreign_fields_are_refused_by_name(
    kind: type[Message], data: st.DataObject
) -> None:
    message = fields(data.draw(MESSAGES[kind]))
    assert message["type"] == kind.__name__.lower()
    assert "unknown field `extra`" in refusal(msgspec.msgpack.encode({**message, "extra": 1}), kind)
    foreign = msgspec.msgpack.encode({**message, "type": "parcel"})
    assert "Invalid value 'parcel' - at `$.type`" in refusal(foreign, kind)
    for name in message:
        foreign_value = "yes" if isinstance(message[name], bool) else True
        no_field_takes_it = msgspec.msgpack.encode({**message, name: foreign_value})
        assert f"`$.{name}`" in refusal(no_field_takes_it, kind)
    required = [f.name for f in msgspec.structs.fields(kind) if f.required]
    for name in required:
        rest = {key: value for key, value in message.items() if key != name}
        assert f"missing required field `{name}`" in refusal(msgspec.msgpack.encode(rest), kind)


@pytest.mark.parametrize(
    "message", [WORK, Wait(retry_after_s=1.0), Retired(), Tell()], ids=lambda m: type(m).__name__
)
def test_an_answer_to_a_check_in_is_told_apart_by_its_type(message: CheckInAnswer) -> None:
    assert decode(encode(message), ANSWER) == message


def test_an_answer_of_another_union_is_refused() -> None:
    assert "Invalid value 'enrolled'" in refusal(encode(Enrolled(device="a" * 32)), ANSWER)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("lease", "0123"),
        ("lease", "0" * 31 + "G"),
        ("expires_in_s", -1.0),
        ("expires_in_s", float("nan")),
        ("plan.bundle", "B" * 64),
        ("plan.live", []),
        ("plan.round", -1),
        ("plan.round", 2**60),
        ("plan.task", "x" * 101),
        ("plan.task", "a\0b"),
        ("plan.training.learning_rate", 0.0),
        ("plan.training.local_steps", 0),
        ("plan.codec.quantise", "int5"),
        ("plan.rank", 0),
        ("plan.method.name", "fedprox"),
    ],
)
def test_a_value_out_of_range_is_refused_with_its_place(path: str, value: object) -> None:
    message = fields(WORK)
    *sections, name = path.split(".")
    place = message
    for section in sections:
        place = place[section]
    place[name] = value
    assert f"`$.{path}" in refusal(msgspec.msgpack.encode(message), Work)


def test_a_codec_that_contradicts_itself_is_refused_as_a_message() -> None:
    message = fields(WORK)
    message["plan"]["codec"] |= {"rounding": "stochastic", "error_feedback": True}
    assert "codec.error_feedback = True is not allowed" in refusal(msgspec.msgpack.encode(message), Work)


def test_a_message_over_the_limit_is_refused_before_it_is_read() -> None:
    assert refusal(bytes(MESSAGE_LIMIT_BYTES + 1), Work) == (
        "a message has 16385 bytes, at most 16384 are read"  # 16·1024 + 1
    )


def test_every_prefix_of_a_message_is_refused() -> None:
    data = encode(WORK)
    for end in range(len(data)):
        refusal(data[:end], Work)
    refusal(data + b"\0", Work)


@given(st.binary(max_size=200))
@quick
def test_any_bytes_give_a_message_or_a_wire_error(data: bytes) -> None:
    for kind in (ANSWER, Problem, Receipt):
        try:
            message = decode(data, kind)
        except WireError:
            continue
        assert decode(encode(message), kind) == message


def test_deep_nesting_is_refused_like_any_other_nonsense() -> None:
    refusal(b"\x91" * MESSAGE_LIMIT_BYTES, Work)
    refusal(b"\x81\xa4plan" + b"\x81\xa1x" * 5000, Work)


def test_the_largest_plan_of_a_large_model_fits_into_a_message() -> None:
    live = tuple(range(32 * 2 * 12 + 5))  # 32 blocks of 2 sites of 6 + 6 cores, and a head of 5 factors
    plan = msgspec.structs.replace(WORK.plan, live=live)
    assert decode(encode(msgspec.structs.replace(WORK, plan=plan)), Work).plan.live == live


def test_every_refusal_has_one_http_status_of_an_error() -> None:
    assert set(STATUS) == set(Code)
    assert all(400 <= status < 600 for status in STATUS.values())


def test_the_golden_work_is_written_and_read_byte_for_byte() -> None:
    golden = bytes.fromhex((GOLDEN / "work.hex").read_text())
    assert encode(WORK) == golden
    assert decode(golden, ANSWER) == WORK


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("enroll", Enroll(public_key=bytes(range(32)), token="ab" * 24, client="fedtt 0.1.0")),
        ("check-in", CheckIn(client="fedtt 0.1.0", runtimes=("onnxruntime",), examples=42)),
        ("failure", Failure(code=FailureCode.CONDITIONS, detail="battery")),
        ("work", WORK),
    ],
)
def test_what_the_first_release_sends_is_understood(name: str, message: Message) -> None:
    golden = bytes.fromhex((GOLDEN / f"first-{name}.hex").read_text())
    assert decode(golden, type(message)) == message


check_ins = MESSAGES[CheckIn]


@given(check_ins, check_ins)
@quick
def test_short_check_ins_are_equal_where_the_full_ones_are(one: CheckIn, other: CheckIn) -> None:
    assert decode(encode(one), CheckIn).as_told() == one.as_told()
    assert (one.as_told() == other.as_told()) == (one == other)


TOLD = CheckIn(client="a", runtimes=("onnxruntime", "b"), examples=5, memory_mb=7)


@pytest.mark.parametrize(
    "change",
    [
        {"client": "aonnxruntime", "runtimes": ("b",)},
        {"runtimes": ("b", "onnxruntime")},
        {"runtimes": ("onnxruntimeb",)},
        {"runtimes": ()},
        {"examples": 7, "memory_mb": 5},
        {"examples": 6},
        {"memory_mb": 0},
        {"judges": True},
    ],
)
def test_each_fact_counts_in_its_place(change: dict[str, Any]) -> None:
    assert msgspec.structs.replace(TOLD, **change).as_told().digest != TOLD.as_told().digest


def test_a_short_check_in_takes_26_bytes() -> None:
    assert len(encode(TOLD.as_told())) == 26  # 1 + 5 + 7 + 7 + 6


def test_either_form_of_a_check_in_is_read_and_without_its_type_the_full_one() -> None:
    full, short = fields(TOLD), fields(TOLD.as_told())
    untyped = {name: value for name, value in full.items() if name != "type"}
    assert decode_check_in(encode(TOLD)) == decode_check_in(msgspec.msgpack.encode(untyped)) == TOLD
    assert decode_check_in(encode(TOLD.as_told())) == TOLD.as_told()
    for wrong, place in (
        (short | {"client": "a"}, "unknown field `client`"),
        (short | {"digest": b"abc"}, "`$.digest`"),
        (short | {"type": "checkin"}, "unknown field `digest`"),
        (full | {"type": "enroll"}, "Invalid value 'enroll' - at `$.type`"),
        (full | {"type": 1}, "`$.type`"),
        ([], "Expected `object`"),
    ):
        with pytest.raises(WireError, match=re.escape(place)):
            decode_check_in(msgspec.msgpack.encode(wrong))


def test_a_devices_name_is_the_beginning_of_its_keys_hash() -> None:
    assert device_id(bytes(32)) == hashlib.sha256(bytes(32)).hexdigest()[:32]


@pytest.mark.parametrize("method", [FedTTPlus(), ExactFedTT()])
def test_options_at_their_defaults_are_not_in_a_plan_so_that_clients_from_before_them_read_it(
    method: FedTTPlus | ExactFedTT,
) -> None:
    whole = msgspec.structs.replace(method, whole_head=True)
    assert set(msgspec.to_builtins(method)) == {"name"}
    assert set(msgspec.to_builtins(whole)) == {"name", "whole_head"}


def test_an_answer_of_another_release_names_its_lease_where_it_is_work() -> None:
    lease = "0f" * 16
    for answer in ({"type": "work", "lease": lease, "plan": "later"}, {"type": "judge", "lease": lease}):
        with pytest.raises(ForeignWork, match="older than its server") as caught:
            decode_answer(msgspec.msgpack.encode(answer))
        assert caught.value.lease == lease
    for answer in ({"type": "wait"}, {"type": "work", "lease": "short"}, {"type": "later", "lease": lease}):
        with pytest.raises(WireError, match="not a valid message") as other:
            decode_answer(msgspec.msgpack.encode(answer))
        assert type(other.value) is WireError
    assert decode_answer(encode(Wait(retry_after_s=1.0))) == Wait(retry_after_s=1.0)
