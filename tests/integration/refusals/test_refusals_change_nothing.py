"""Each call with each fault: refused with the right code, counted, and not a bit of the ledger changed."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from msgspec.structs import replace

from fedtt.messages import Code, Failure, FailureCode, encode
from tests.support.matrix import (
    CALLS,
    STRANGER,
    Call,
    Place,
    signed,
)
from tests.support.served import CHECK_IN, LAYOUT, Answer, frame_of, refused

pytestmark = pytest.mark.asyncio(loop_scope="module")


Sign = Callable[[Place, Call], dict[str, str]]


async def test_every_call_is_taken_when_it_is_signed_as_it_should_be(place: Place) -> None:
    calls = place.calls()
    del calls["verdict"]  # of which the device has nothing to give here
    for name, call in calls.items():
        answer = await place.send(call, place.peer.signed(call.method, call.path, call.body))
        assert answer.status < 300, (name, answer.body)


def damaged(place: Place, call: Call) -> dict[str, str]:
    headers = signed(place, call)
    value = headers["Signature"]
    return headers | {"Signature": value[:20] + ("A" if value[20] != "A" else "B") + value[21:]}


FAULTS: dict[str, tuple[Code, Sign]] = {
    "no signature": (Code.BAD_SIGNATURE, lambda _place, _call: {}),
    "a damaged signature": (Code.BAD_SIGNATURE, damaged),
    "another method's signature": (
        Code.BAD_SIGNATURE,
        lambda place, call: signed(place, replace(call, method="PATCH")),
    ),
    "another path's signature": (
        Code.BAD_SIGNATURE,
        lambda place, call: signed(place, replace(call, path="/v1/device/leave/x")),
    ),
    "another server's signature": (
        Code.BAD_SIGNATURE,
        lambda place, call: signed(place, call, authority="fedtt.example.org"),
    ),
    "another body's signature": (
        Code.BAD_SIGNATURE,
        lambda place, call: signed(place, replace(call, body=call.body + b"x")),
    ),
    "a clock behind": (Code.CLOCK_SKEW, lambda place, call: signed(place, call, late_s=-400)),
    "a clock ahead": (Code.CLOCK_SKEW, lambda place, call: signed(place, call, late_s=400)),
    "an expired signature": (
        Code.CLOCK_SKEW,
        lambda place, call: signed(place, call, late_s=-200, lasts_s=100),
    ),
    "a signature for a day": (Code.BAD_SIGNATURE, lambda place, call: signed(place, call, lasts_s=86400)),
    "a stranger's key": (Code.UNKNOWN_DEVICE, lambda place, call: signed(place, call, by=STRANGER)),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("name", CALLS)
async def test_a_fault_in_the_signature_changes_nothing(place: Place, name: str, fault: str) -> None:
    code, sign = FAULTS[fault]
    call = place.calls()[name]
    if name == "enroll" and code is Code.UNKNOWN_DEVICE:
        code = Code.BAD_SIGNATURE  # the key that signs is not the one it brings
    if name == "receipt":
        await place.peer.transport.upload(place.work.lease, frame_of(place.work.plan))
    with place.unchanged(code):
        problem = refused(await place.send(call, sign(place, call)), code)
    assert (problem.now is not None) == (code is Code.CLOCK_SKEW)


# the same bytes again


async def twice(place: Place, name: str, code: Code | None = None) -> Answer:
    """Send a call, then once more to the byte: the second answer, which has left the ledger alone."""
    call = place.calls()[name]
    headers = place.peer.signed(call.method, call.path, call.body)
    first = await place.send(call, headers)
    assert first.status < 300, first.body
    with place.unchanged(code):
        return await place.send(call, headers)


async def test_a_replay_of_what_changes_a_device_is_refused(place: Place) -> None:
    for name, code in (
        ("check in", Code.REPLAYED),
        ("leave", Code.REPLAYED),
        ("erase", Code.UNKNOWN_DEVICE),
    ):
        refused(await twice(place, name, code), code)


async def test_a_replay_of_anything_else_gets_the_same_answer_and_changes_nothing(place: Place) -> None:
    for name in ("enroll", "bundle", "version", "upload", "receipt", "failure"):
        assert (await twice(place, name)).status < 300, name


async def test_an_enrolment_that_was_recorded_does_not_bring_a_device_back(place: Place) -> None:
    call = place.calls()["enroll"]
    recorded = place.peer.signed(call.method, call.path, call.body)
    for erase in (False, True):
        await place.peer.transport.leave(erase=erase)
        with place.unchanged(Code.REPLAYED):
            refused(await place.send(call, recorded), Code.REPLAYED)
    await place.peer.enroll(place.server.token)
    await place.peer.transport.check_in(CHECK_IN)


async def test_an_older_request_that_arrives_late_is_refused(place: Place) -> None:
    call = place.calls()["leave"]
    early = place.peer.signed(call.method, call.path, call.body)
    await place.peer.work()
    with place.unchanged(Code.REPLAYED):
        problem = refused(await place.send(call, early), Code.REPLAYED)
    assert "sign again with a higher nonce" in problem.remedy


# sound signatures over contents that are not

NOT_FINITE = np.full(LAYOUT.size, np.nan, np.float32)
FAILED = encode(Failure(code=FailureCode.OTHER))
CONTENTS: dict[str, tuple[Code, Callable[[Place], Call]]] = {
    "an update cut short": (Code.MALFORMED, lambda place: uploading(place, frame_of(place.plan)[:-1])),
    "an update that is no frame": (Code.MALFORMED, lambda place: uploading(place, b"\0" * 200)),
    "an update without a body": (Code.MALFORMED, lambda place: uploading(place, b"")),
    "an update for another layout": (
        Code.WRONG_LAYOUT,
        lambda place: uploading(place, frame_of(place.plan, layout=b"otherone")),
    ),
    "an update that is not finite": (
        Code.NOT_FINITE,
        lambda place: uploading(place, frame_of(place.plan, NOT_FINITE)),
    ),
    "an update of no examples": (
        Code.MALFORMED,
        lambda place: uploading(place, frame_of(place.plan, examples=0)),
    ),
    "an update whose loss is not finite": (
        Code.MALFORMED,
        lambda place: uploading(place, frame_of(place.plan, loss_last=math.inf)),
    ),
    "an update that is too long": (Code.TOO_LARGE, lambda place: uploading(place, bytes(100_000))),
    "an update under no lease": (
        Code.UNKNOWN_LEASE,
        lambda place: Call("PUT", f"/v1/leases/{'0' * 32}/update", frame_of(place.plan)),
    ),
    "a verdict of a device that was not asked": (Code.UNKNOWN_LEASE, lambda place: place.calls()["verdict"]),
    "a failure that is no message": (
        Code.MALFORMED,
        lambda place: Call("POST", f"/v1/leases/{place.work.lease}/failure", b"{}"),
    ),
    "a failure under no lease": (
        Code.UNKNOWN_LEASE,
        lambda place: Call("POST", f"/v1/leases/{'0' * 32}/failure", FAILED),
    ),
    "a check-in that is no message": (Code.MALFORMED, lambda _: Call("POST", "/v1/check-in", b"\xc1")),
    "a check-in that is too long": (Code.TOO_LARGE, lambda _: Call("POST", "/v1/check-in", bytes(20_000))),
    "a version that is not there": (Code.NOT_FOUND, lambda _: Call("GET", f"/v1/versions/{'0' * 64}")),
    "a file that no bundle has": (
        Code.NOT_FOUND,
        lambda place: Call("GET", f"/v1/bundles/{place.plan.bundle}/no.onnx"),
    ),
}


def uploading(place: Place, frame: bytes) -> Call:
    return Call("PUT", f"/v1/leases/{place.work.lease}/update", frame)


@pytest.mark.parametrize("content", CONTENTS)
async def test_a_fault_in_the_content_changes_nothing(place: Place, content: str) -> None:
    code, made = CONTENTS[content]
    call = made(place)
    with place.unchanged(code):
        refused(await place.send(call, place.peer.signed(call.method, call.path, call.body)), code)


async def test_other_bytes_and_another_end_of_a_lease_that_was_answered_change_nothing(place: Place) -> None:
    await place.peer.transport.upload(place.work.lease, frame_of(place.plan))
    for call, code in (
        (uploading(place, frame_of(place.plan, examples=6)), Code.CONFLICT),
        (place.calls()["verdict"], Code.UNKNOWN_LEASE),
    ):
        with place.unchanged(code):
            refused(await place.send(call, place.peer.signed(call.method, call.path, call.body)), code)


async def test_an_update_under_a_lease_that_was_given_back_changes_nothing(place: Place) -> None:
    await place.peer.transport.fail(place.work.lease, Failure(code=FailureCode.OTHER))
    call = uploading(place, frame_of(place.plan))
    with place.unchanged(Code.STALE):
        refused(await place.send(call, place.peer.signed(call.method, call.path, call.body)), Code.STALE)
