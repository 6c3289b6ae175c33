"""Who may not do what a device may: refused with the right code, counted, and the ledger as before."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest
from msgspec.structs import replace

from fedtt.messages import Code, Enroll, Judge, encode
from tests.support.matrix import (
    CALLS,
    STRANGER,
    VERDICT,
    Call,
    Place,
    signed,
)
from tests.support.served import CHECK_IN, Peer, Served, refused, task_text, until

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest.mark.parametrize("name", ["upload", "receipt", "verdict", "failure"])
async def test_another_devices_lease_is_worth_nothing(place: Place, name: str) -> None:
    async with place.server.device() as thief:
        call = place.calls()[name]
        with place.unchanged(Code.UNKNOWN_LEASE):
            answer = await place.send(call, thief.signed(call.method, call.path, call.body))
            refused(answer, Code.UNKNOWN_LEASE, "was never given to this device")


async def question(server: Served, trainer: Peer, judge: Peer, bundle: str) -> Judge:
    """What a device is asked about a version that another one has trained, in a task of its own."""
    text = task_text("judged", buffer=1) + "\n[evaluation]\ndevices = 1\nbound = 0.05\n"
    await server.admin.create_task(text, bundle)
    await server.admin.task("lights", "/pause", "POST")
    await trainer.update()

    async def asked() -> Judge | None:
        answer = await judge.transport.check_in(replace(CHECK_IN, judges=True))
        return answer if isinstance(answer, Judge) else None

    found: Judge = await until(asked)
    await server.admin.task("lights", "/resume", "POST")
    await server.service.writer.maintain()
    return found


async def test_another_devices_question_is_worth_nothing(place: Place) -> None:
    server = place.server
    async with server.device() as trainer, server.device() as judge:
        asked = await question(server, trainer, judge, place.plan.bundle)
        call = Call("POST", f"/v1/leases/{asked.lease}/verdict", encode(VERDICT))
        for thief in (trainer, place.peer):
            with place.unchanged(Code.UNKNOWN_LEASE):
                answer = await place.send(call, thief.signed(call.method, call.path, call.body))
                refused(answer, Code.UNKNOWN_LEASE, "was never given to this device")
        taken = await place.send(call, judge.signed(call.method, call.path, call.body))
        assert taken.status == 204

        async def released() -> bool:
            rows = await server.admin.task("judged", "/versions")
            return bool(rows[1]["state"] == "released")

        await until(released)
        await server.admin.task("judged", "/stop", "POST")


@pytest.mark.parametrize("name", CALLS)
async def test_a_revoked_key_is_taken_nowhere(place: Place, name: str) -> None:
    service, device = place.server.service, place.peer.identity.device
    await service.write(lambda tx: service.coordinator.revoke(tx, service.clock.now(), device))
    call = place.calls()[name]
    with place.unchanged(Code.REVOKED):
        answer = await place.send(call, place.peer.signed(call.method, call.path, call.body))
        refused(answer, Code.REVOKED, "an operator has revoked this device's key")


async def unknown_token(_: Place) -> str:
    return "wrong"


async def used_up_token(place: Place) -> str:
    token = str((await place.server.admin.create_token(1, None))["token"])
    async with Peer(place.server.url, 20_000) as first:
        await first.enroll(token)
        await first.transport.leave(erase=True)
    return token


async def expired_token(place: Place) -> str:
    token = str((await place.server.admin.create_token(None, 0.01))["token"])
    await asyncio.sleep(0.05)
    return token


async def revoked_token(place: Place) -> str:
    made = await place.server.admin.create_token(None, None)
    assert (await place.server.people("POST", f"/tokens/{made['sha256']}/revoke")).status == 200
    return str(made["token"])


@pytest.mark.parametrize("token_of", [unknown_token, used_up_token, expired_token, revoked_token])
async def test_a_stranger_with_a_token_that_is_none_or_no_more_changes_nothing(
    place: Place, token_of: Callable[[Place], Awaitable[str]]
) -> None:
    enroll = Enroll(public_key=STRANGER.public_key, token=await token_of(place), client="x")
    call = Call("POST", "/v1/enroll", encode(enroll))
    with place.unchanged(Code.BAD_TOKEN):
        refused(await place.send(call, signed(place, call, by=STRANGER)), Code.BAD_TOKEN)
