"""What a device tells at its check-ins: all where the server has to learn it, else that nothing is new."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from msgspec.structs import replace

from edge_client import events
from edge_client.device_config import DeviceConfig
from edge_client.journal import Idle
from fedtt.errors import Refused, Unreachable
from fedtt.messages import (
    AsTold,
    CheckIn,
    CheckInAnswer,
    Code,
    Failure,
    FailureCode,
    Problem,
    Tell,
    decode_answer,
    encode,
)
from storage.records import LeaseState
from tests.support.device_world import Hooked, World, acknowledged, failing, granted, in_world, lease_of
from tests.support.in_process import TOKEN

ROOMY = DeviceConfig(token=TOKEN, memory_mb=512)


def forms(transport: Hooked) -> list[str]:
    return [type(message).__name__ for message in transport.check_ins]


def test_all_is_told_once_after_enrolment_and_in_no_later_run(tmp_path: Path) -> None:
    async def test(world: World) -> None:
        device, transport = world.device()
        await device.run(until=acknowledged)
        await device.run(until=acknowledged)
        assert forms(transport) == ["CheckIn", "AsTold"]
        device, transport = world.device()
        await device.run(until=lambda step: isinstance(step, events.Waiting))
        assert set(forms(transport)) == {"AsTold"}

    in_world(tmp_path, test)


def test_what_has_changed_is_told_at_once_and_once(tmp_path: Path) -> None:
    async def test(world: World) -> None:
        await world.device()[0].run(until=acknowledged)
        world.examples.add("lights 9", 1)
        device, transport = world.device(config=ROOMY)
        await device.run(until=acknowledged)
        await device.run(until=acknowledged)
        assert forms(transport) == ["AsTold", "CheckIn", "AsTold"]
        with world.service.store.reading() as tx:
            (row,) = tx.devices()
        assert (row.examples, row.memory_mb) == (6, 512)
        assert "Retrying" not in world.kinds()

    in_world(tmp_path, test)


def test_a_server_that_has_forgotten_is_told_again(tmp_path: Path) -> None:
    async def test(world: World) -> None:
        await world.device()[0].run(until=acknowledged)
        with world.service.store.transaction() as tx:  # as from a backup of before the first check-in
            (row,) = tx.devices()
            tx.put_device(replace(row, runtimes=(), examples=0, memory_mb=0))
        device, transport = world.device()
        await device.run(until=acknowledged)
        assert forms(transport) == ["AsTold", "CheckIn"]

    in_world(tmp_path, test)


def test_where_the_answer_was_lost_the_next_check_in_finds_out(tmp_path: Path) -> None:
    async def test(world: World) -> None:
        device, transport = world.device(after=failing(Unreachable("the answer was lost"), "check_in"))
        await device.run(until=granted)
        assert forms(transport) == ["CheckIn", "CheckIn"]
        device, transport = world.device(
            after=failing(Unreachable("the answer was lost"), "check_in", times=2),
            config=ROOMY,
        )
        await device.run(until=acknowledged)
        await device.run(until=acknowledged)
        assert forms(transport) == ["AsTold", "AsTold", "AsTold", "CheckIn"]

    in_world(tmp_path, test)


def test_a_server_of_before_is_told_all_each_time(tmp_path: Path) -> None:
    async def test(world: World) -> None:
        device, transport = world.device()
        newer = transport.check_in

        async def older(message: CheckIn | AsTold) -> CheckInAnswer:
            if isinstance(message, AsTold):
                raise Refused(Problem(code=Code.MALFORMED, detail="Invalid value 'astold' - at `$.type`"))
            return await newer(message)

        transport.check_in = older  # type: ignore[method-assign]
        await device.run(until=acknowledged)
        await device.run(until=acknowledged)
        assert forms(transport) == ["CheckIn", "CheckIn"]
        assert "Retrying" not in world.kinds()

    in_world(tmp_path, test)


def test_a_server_that_is_never_satisfied_is_asked_later(tmp_path: Path) -> None:
    async def test(world: World) -> None:
        device, transport = world.device()

        async def deaf(message: CheckIn | AsTold) -> CheckInAnswer:
            return Tell()

        transport.check_in = deaf  # type: ignore[method-assign]
        step = await device.run(until=lambda step: isinstance(step, events.Retrying))
        assert isinstance(step, events.Retrying)
        assert step.error == "the server asks for what this device has just told it"

    in_world(tmp_path, test)


def test_work_with_a_codec_that_the_device_does_not_know_goes_back_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test(world: World) -> None:
        device, transport = world.device()
        honest = transport.check_in

        async def newer(message: CheckIn | AsTold) -> CheckInAnswer:
            answer = msgspec.msgpack.decode(encode(await honest(message)))
            answer["plan"]["codec"]["quantise"] = "int1"
            return decode_answer(msgspec.msgpack.encode(answer))

        monkeypatch.setattr(transport, "check_in", newer)
        step = await device.run(until=lambda step: not isinstance(step, events.Enrolled))
        assert isinstance(step, events.GaveUp)
        assert "int1" in step.detail
        assert "older than its server" in step.detail
        assert step.pause_s > 0
        assert (device.journal.state.phase, transport.failures) == (Idle(), [Failure(code=FailureCode.OTHER)])
        assert lease_of(world, step.lease).state is LeaseState.FAILED

    in_world(tmp_path, test)
