"""Who may ask a server for something: signatures, clocks, tokens, and what lies there to be had."""

from __future__ import annotations

import hashlib
import struct
from pathlib import Path

import pytest
from msgspec.structs import replace

from fedtt.errors import Refused
from fedtt.messages import (
    Code,
    Enroll,
    encode,
)
from fedtt.signature import content_digest
from tests.support.clock import VirtualClock
from tests.support.served import CHECK_IN, LAYOUT, Attacked, Peer, refused

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.usefixtures("nothing_accepted_is_lost")]

NOWHERE = "/v1/leases/" + "0" * 32
NOBODY = "0" * 64


# who asks


async def test_a_wrong_enrolment_token_is_refused(place: Attacked) -> None:
    async with Peer(place.server.url, 9001) as stranger:
        with pytest.raises(Refused) as caught:
            await stranger.enroll("guessed")
    assert caught.value.problem.code is Code.BAD_TOKEN
    assert str(caught.value) == (
        "bad_token: the enrolment token is unknown, used up or expired "
        "(ask whoever runs the server for a new one)"
    )


UNSIGNED = {
    "nothing": {},
    "garbage": {"Content-Digest": "x", "Signature-Input": "y", "Signature": "z"},
    "another hash": {"Content-Digest": "sha-512=:AAAA:"},
    "bytes that are no text": {"Content-Digest": "sha-256=:\udcff\udcfe:", "Signature": "\udcff"},
    "a short signature": {"Signature": "sig1=:AAAA:"},
    "another label": {"Signature-Input": 'sig2=("@method");created=1;keyid="0";alg="ed25519"'},
}


@pytest.mark.parametrize("headers", UNSIGNED.values(), ids=UNSIGNED.keys())
async def test_a_request_without_a_proper_signature_is_refused(
    place: Attacked, device: Peer, headers: dict[str, str]
) -> None:
    sound = device.signed("POST", "/v1/check-in", encode(CHECK_IN)) if headers else {}
    answer = await place.server.raw("POST", "/v1/check-in", encode(CHECK_IN), sound | headers)
    refused(answer, Code.BAD_SIGNATURE, "sign the request with the device's own key")


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", f"/v1/bundles/{NOBODY}/manifest.json"),
        ("GET", f"/v1/versions/{NOBODY}"),
        ("PUT", f"{NOWHERE}/update"),
        ("GET", NOWHERE),
        ("POST", f"{NOWHERE}/failure"),
        ("POST", "/v1/device/leave"),
        ("DELETE", "/v1/device"),
    ],
)
async def test_every_call_but_enrolment_wants_a_signature(place: Attacked, method: str, path: str) -> None:
    refused(await place.server.raw(method, path), Code.BAD_SIGNATURE, "Content-Digest")


async def test_a_signature_is_good_for_its_own_request_alone(place: Attacked, device: Peer) -> None:
    body = encode(CHECK_IN)
    check_in = device.signed("POST", "/v1/check-in", body)
    for method, path in (("POST", "/v1/device/leave"), ("DELETE", "/v1/device"), ("GET", NOWHERE)):
        answer = await place.server.raw(method, path, body, check_in)
        refused(answer, Code.BAD_SIGNATURE, "the signature does not match the request")
    elsewhere = await place.server.raw("POST", "/v1/check-in", body, check_in | {"Host": "example.org"})
    refused(elsewhere, Code.BAD_SIGNATURE, "the signature does not match the request")
    assert (await place.server.raw("POST", "/v1/check-in", body, check_in)).status == 200


async def test_bytes_that_are_no_text_are_no_bug_of_the_server(place: Attacked, device: Peer) -> None:
    signed = "".join(f"{name}: {value}\r\n" for name, value in device.signed("GET", NOWHERE).items()).encode()
    for target, host in ((NOWHERE.encode(), b"\xff\xfe"), (NOWHERE.encode() + b"?\xff", b"x")):
        reader, writer = await place.server.connect()
        writer.write(b"GET " + target + b" HTTP/1.1\r\nHost: " + host + b"\r\n" + signed + b"\r\n")
        assert (await reader.readline()).split(b" ")[1] in {b"400", b"401"}
        writer.close()


async def test_nobody_signs_for_another_device(place: Attacked, device: Peer) -> None:
    body = encode(CHECK_IN)
    mine = device.signed("POST", "/v1/check-in", body)
    claimed = mine["Signature-Input"].replace(device.identity.device, place.honest.identity.device)
    headers = {
        "Content-Digest": content_digest(body),
        "Signature-Input": claimed,
        "Signature": mine["Signature"],
    }
    refused(
        await place.server.raw("POST", "/v1/check-in", body, headers),
        Code.BAD_SIGNATURE,
        "the signature does not match the request",
    )


async def test_a_device_that_never_enrolled_or_was_erased_is_told_to_enrol(
    place: Attacked, device: Peer
) -> None:
    async with Peer(place.server.url, 9002) as stranger:
        answer = await stranger.request("POST", "/v1/check-in", encode(CHECK_IN))
    refused(answer, Code.UNKNOWN_DEVICE, "this device is not enrolled here", "enrol with a token first")
    await device.transport.leave(erase=True)
    answer = await device.request("POST", "/v1/check-in", encode(CHECK_IN))
    refused(answer, Code.UNKNOWN_DEVICE, "this device is not enrolled here")


async def test_what_was_measured_of_a_device_leaves_the_disk_when_it_is_erased(
    place: Attacked, device: Peer
) -> None:
    service, name, loss = place.server.service, device.identity.device, 2.718281828459045
    await device.update(loss_first=loss)
    stored = struct.pack(">d", loss)  # as SQLite writes a REAL
    data = place.server.bundle.parent / "data"

    def on_disk() -> bool:
        return any(stored in file.read_bytes() for file in data.glob("fedtt.db*"))

    before = await service.read(lambda tx: tx.participation(1, name))
    assert before is not None
    assert (before.count, before.last_loss) == (1, loss)
    assert on_disk()
    await device.transport.leave(erase=True)
    await service.tick()
    after = await service.read(lambda tx: tx.participation(1, name))
    assert after == replace(before, last_loss=None, duration_s=None)
    assert not on_disk()


@pytest.mark.parametrize("off_s", [-400.0, 400.0, 10.0**9])
async def test_a_wrong_clock_is_told_the_servers_time(place: Attacked, device: Peer, off_s: float) -> None:
    body, now = encode(CHECK_IN), place.server.service.clock.now()
    headers = device.signed("POST", "/v1/check-in", body, created=now + off_s)
    problem = refused(
        await place.server.raw("POST", "/v1/check-in", body, headers), Code.CLOCK_SKEW, "set the clock"
    )
    assert problem.now is not None
    assert abs(problem.now - now) < 60


async def test_a_device_with_a_wrong_clock_gets_through_at_the_second_try(place: Attacked) -> None:
    behind = VirtualClock(start=1_000_000.0)
    async with place.server.device(clock=behind) as peer:
        await peer.work()
        (offset_s,) = peer.offsets_s
        assert abs(behind.now() + offset_s - place.server.service.clock.now()) < 60


# downloads


async def test_what_a_device_asks_for_and_is_not_there_is_a_typed_404(device: Peer) -> None:
    bundle = (await device.work()).plan.bundle
    for path, said in {
        f"/v1/versions/{NOBODY}": "version 000000000000",
        f"/v1/bundles/{NOBODY}/manifest.json": "bundle 000000000000",
        f"/v1/bundles/{bundle}/fedtt.db": "file 'fedtt.db' in bundle",
    }.items():
        refused(await device.request("GET", path), Code.NOT_FOUND, said)


async def test_what_the_plan_names_comes_whole_and_a_part_of_a_file_where_asked(
    place: Attacked, device: Peer
) -> None:
    plan = (await device.work()).plan
    version = await device.transport.version(plan.version, 4 * LAYOUT.size)
    assert hashlib.sha256(version.data).hexdigest() == plan.version
    base = (place.server.bundle / "base.bin").read_bytes()
    for offset in (0, 1, 999):
        part = [piece async for piece in device.transport.bundle_file(plan.bundle, "base.bin", offset)]
        assert b"".join(part) == base[offset:]


async def test_enrolling_again_changes_nothing(place: Attacked) -> None:
    await place.honest.enroll(place.server.token)
    message = Enroll(public_key=place.honest.identity.public_key, token="guessed", client="x")
    assert (await place.honest.transport.enroll(message)).device == place.honest.identity.device


async def test_a_store_that_fails_is_the_servers_fault_and_may_pass(
    place: Attacked, device: Peer, caplog: pytest.LogCaptureFixture
) -> None:
    plan = (await device.work()).plan
    blob = Path(place.server.service.blobs.path(plan.version))  # type: ignore[attr-defined]
    sound = blob.read_bytes()
    blob.write_bytes(b"damaged")
    try:
        answer = await device.request("GET", f"/v1/versions/{plan.version}")
    finally:
        blob.write_bytes(sound)
    refused(answer, Code.BUSY, "the server cannot use its storage now; nothing was changed")
    assert answer.headers["Retry-After"] in {"1", "2", "3"}
    assert "is damaged where it is stored: restore it from a backup" in caplog.text
