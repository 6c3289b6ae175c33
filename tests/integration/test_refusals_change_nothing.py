"""Each call with each fault: refused with the right code, counted, and not a bit of the ledger changed."""

from __future__ import annotations

import hashlib
import math
import sqlite3
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import pytest_asyncio
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from msgspec import Struct
from msgspec.structs import replace

from aggregator.metrics import totals
from edge_client.identity import Identity
from fedtt.messages import Code, Enroll, Failure, FailureCode, Judged, Plan, Verdict, Work, encode
from fedtt.signature import Signed, content_digest, signature_base, signature_headers
from tests.support.served import CHECK_IN, LAYOUT, Answer, Peer, Served, frame_of, refused, served, task_text

VERDICT = Verdict(examples=1, before=Judged(loss=1.0), after=Judged(loss=1.0))
pytestmark = pytest.mark.asyncio(loop_scope="module")


class Call(Struct, frozen=True):
    """One request before it is signed."""

    method: str
    path: str
    body: bytes = b""


class Place(Struct, frozen=True):
    """A server with a device that holds a lease, and its ledger's file."""

    server: Served
    peer: Peer
    work: Work
    database: Path

    @property
    def plan(self) -> Plan:
        return self.work.plan

    def calls(self) -> dict[str, Call]:
        lease, plan = f"/v1/leases/{self.work.lease}", self.work.plan
        token, key = self.server.token, self.peer.identity.public_key
        return {
            "enroll": Call("POST", "/v1/enroll", encode(Enroll(public_key=key, token=token, client="x"))),
            "check in": Call("POST", "/v1/check-in", encode(CHECK_IN)),
            "bundle": Call("GET", f"/v1/bundles/{plan.bundle}/manifest.json"),
            "version": Call("GET", f"/v1/versions/{plan.version}"),
            "upload": Call("PUT", f"{lease}/update", frame_of(plan)),
            "receipt": Call("GET", lease),
            "verdict": Call("POST", f"{lease}/verdict", encode(VERDICT)),
            "failure": Call("POST", f"{lease}/failure", encode(Failure(code=FailureCode.OTHER))),
            "leave": Call("POST", "/v1/device/leave"),
            "erase": Call("DELETE", "/v1/device"),
        }

    def snapshot(self) -> str:
        """A hash over every row of every table."""
        with closing(sqlite3.connect(self.database)) as connection:
            return hashlib.sha256("\n".join(connection.iterdump()).encode()).hexdigest()

    def refusals(self) -> Counter[str]:
        """How many have been counted, by their codes."""
        return Counter(totals(self.server.service.metrics.refusals, "code"))

    async def send(self, call: Call, headers: dict[str, str]) -> Answer:
        return await self.server.raw(call.method, call.path, call.body, headers)


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def server(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[tuple[Served, Path]]:
    directory = tmp_path_factory.mktemp("refusals")
    async with served(directory, task_text()) as started:
        yield started, directory / "data" / "fedtt.db"


@pytest_asyncio.fixture(loop_scope="module")
async def place(server: tuple[Served, Path]) -> AsyncIterator[Place]:
    started, database = server
    async with started.device() as peer:
        work = await peer.work()
        await started.service.writer.maintain()  # what devices before this one have left behind
        yield Place(started, peer, work, database)


CALLS = (
    "enroll",
    "check in",
    "bundle",
    "version",
    "upload",
    "receipt",
    "verdict",
    "failure",
    "leave",
    "erase",
)
Sign = Callable[[Place, Call], dict[str, str]]


def signed(
    place: Place, call: Call, *, by: Identity | None = None, authority: str = "", **changes: int
) -> dict[str, str]:
    """Sound headers, but for what is changed: `late_s` shifts all times, `lasts_s` sets the expiry."""
    now = int(place.server.service.clock.now()) + changes.get("late_s", 0)
    identity = by or place.peer.identity
    claim = Signed(
        method=call.method,
        authority=authority or place.server.url.removeprefix("http://"),
        path=call.path,
        digest=content_digest(call.body),
        created=now,
        expires=now + changes.get("lasts_s", 300),
        nonce=now * 10**6,
        device=identity.device,
    )
    return signature_headers(claim, identity._key.sign(signature_base(claim)))


async def test_every_call_is_taken_when_it_is_signed_as_it_should_be(place: Place) -> None:
    calls = place.calls()
    del calls["verdict"]  # of which the device has nothing to give here
    for name, call in calls.items():
        answer = await place.send(call, place.peer.signed(call.method, call.path, call.body))
        assert answer.status < 300, (name, answer.body)


STRANGER = Identity(Ed25519PrivateKey.from_private_bytes(b"\7" * 32))


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
    call, before = place.calls()[name], place.snapshot()
    if name == "enroll" and code is Code.UNKNOWN_DEVICE:
        code = Code.BAD_SIGNATURE  # the key that signs is not the one it brings
    if name == "receipt":
        await place.peer.transport.upload(place.work.lease, frame_of(place.work.plan))
        before = place.snapshot()
    counted = place.refusals()
    problem = refused(await place.send(call, sign(place, call)), code)
    assert place.refusals() - counted == {code.value: 1}
    assert (problem.now is not None) == (code is Code.CLOCK_SKEW)
    assert place.snapshot() == before


# the same bytes again


async def twice(place: Place, name: str) -> tuple[Answer, bool]:
    """Send a call, then once more to the byte: the second answer, and whether it left the ledger alone."""
    call = place.calls()[name]
    headers = place.peer.signed(call.method, call.path, call.body)
    first = await place.send(call, headers)
    assert first.status < 300, first.body
    before = place.snapshot()
    return await place.send(call, headers), place.snapshot() == before


async def test_a_replay_of_what_changes_a_device_is_refused(place: Place) -> None:
    for name, code in (
        ("check in", Code.REPLAYED),
        ("leave", Code.REPLAYED),
        ("erase", Code.UNKNOWN_DEVICE),
    ):
        answer, untouched = await twice(place, name)
        refused(answer, code)
        assert untouched, name


async def test_a_replay_of_anything_else_gets_the_same_answer_and_changes_nothing(place: Place) -> None:
    for name in ("enroll", "bundle", "version", "upload", "receipt", "failure"):
        answer, untouched = await twice(place, name)
        assert answer.status < 300, name
        assert untouched, name


async def test_an_enrolment_that_was_recorded_does_not_bring_a_device_back(place: Place) -> None:
    call = place.calls()["enroll"]
    recorded = place.peer.signed(call.method, call.path, call.body)
    await place.peer.transport.leave(erase=False)
    before = place.snapshot()
    refused(await place.send(call, recorded), Code.REPLAYED)
    await place.peer.transport.leave(erase=True)
    left = place.snapshot()
    refused(await place.send(call, recorded), Code.REPLAYED)
    assert before != left == place.snapshot()
    await place.peer.enroll(place.server.token)
    await place.peer.transport.check_in(CHECK_IN)


async def test_an_older_request_that_arrives_late_is_refused(place: Place) -> None:
    call = place.calls()["leave"]
    early = place.peer.signed(call.method, call.path, call.body)
    await place.peer.work()
    before = place.snapshot()
    problem = refused(await place.send(call, early), Code.REPLAYED)
    assert "sign again with a higher nonce" in problem.remedy
    assert place.snapshot() == before


# who may not


@pytest.mark.parametrize("name", ["upload", "receipt", "failure"])
async def test_another_devices_lease_is_worth_nothing(place: Place, name: str) -> None:
    async with place.server.device() as thief:
        call, before = place.calls()[name], place.snapshot()
        answer = await place.send(call, thief.signed(call.method, call.path, call.body))
        refused(answer, Code.UNKNOWN_LEASE, "was never given to this device")
        assert place.snapshot() == before


@pytest.mark.parametrize("name", CALLS)
async def test_a_revoked_key_is_taken_nowhere(place: Place, name: str) -> None:
    service, device = place.server.service, place.peer.identity.device
    await service.write(lambda tx: service.coordinator.revoke(tx, service.clock.now(), device))
    call, before = place.calls()[name], place.snapshot()
    answer = await place.send(call, place.peer.signed(call.method, call.path, call.body))
    refused(answer, Code.REVOKED, "an operator has revoked this device's key")
    assert place.snapshot() == before


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
    before, counted = place.snapshot(), place.refusals()
    answer = await place.send(call, place.peer.signed(call.method, call.path, call.body))
    refused(answer, code)
    assert place.snapshot() == before
    assert place.refusals() - counted == {code.value: 1}


async def test_other_bytes_and_another_end_of_a_lease_that_was_answered_change_nothing(place: Place) -> None:
    await place.peer.transport.upload(place.work.lease, frame_of(place.plan))
    before = place.snapshot()
    for call, code in (
        (uploading(place, frame_of(place.plan, examples=6)), Code.CONFLICT),
        (place.calls()["verdict"], Code.UNKNOWN_LEASE),
    ):
        refused(await place.send(call, place.peer.signed(call.method, call.path, call.body)), code)
    assert place.snapshot() == before


async def test_an_update_under_a_lease_that_was_given_back_changes_nothing(place: Place) -> None:
    await place.peer.transport.fail(place.work.lease, Failure(code=FailureCode.OTHER))
    call, before = uploading(place, frame_of(place.plan)), place.snapshot()
    refused(await place.send(call, place.peer.signed(call.method, call.path, call.body)), Code.STALE)
    assert place.snapshot() == before


async def test_a_stranger_with_a_wrong_token_changes_nothing(place: Place) -> None:
    enroll = Enroll(public_key=STRANGER.public_key, token="wrong", client="x")
    call, before = Call("POST", "/v1/enroll", encode(enroll)), place.snapshot()
    refused(await place.send(call, signed(place, call, by=STRANGER)), Code.BAD_TOKEN)
    assert place.snapshot() == before
