"""A server that answers in due form and wants a device's battery: what it can have of it is bounded."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from itertools import count
from pathlib import Path

import pytest
from msgspec.structs import replace

from edge_client import events
from edge_client.device import Device
from edge_client.events import Step
from edge_client.journal import Leased
from fedtt.messages import AsTold, CheckIn, CheckInAnswer, Code, Judge, Verdict, Wait, Work
from tests.support.device_world import SPEC, World, failing, granted, in_world, refusal


async def _work(device: Device) -> Work:
    """What the server gives it, which it forgets."""
    await device.run(until=granted)
    phase = device.journal.state.phase
    assert isinstance(phase, Leased)
    device.journal.drop(phase.work.lease)
    return phase.work


async def _granting(
    device: Device, **changes: float
) -> Callable[[CheckIn | AsTold], Awaitable[CheckInAnswer]]:
    """A server that gives the same work under ever new leases."""
    work, leases = await _work(device), count(1000)

    async def granting(_: CheckIn | AsTold) -> CheckInAnswer:
        return replace(work, lease=f"{next(leases):032x}", **changes)

    return granting


def pauses(world: World, kind: type[Step]) -> list[float]:
    return [event.pause_s for event in world.seen if isinstance(event, kind)]


async def twelve(world: World, device: Device, kind: type[Step]) -> list[float]:
    """The pauses after the first twelve steps of a kind."""
    left = count(12, -1)
    await device.run(until=lambda step: isinstance(step, kind) and next(left) == 1)
    return pauses(world, kind)


def test_waits_of_no_time_end_in_one_question_a_second(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def lie(_: CheckIn | AsTold) -> CheckInAnswer:
        return Wait(retry_after_s=0.0)

    async def test(world: World) -> None:
        device, transport = world.device()
        monkeypatch.setattr(transport, "check_in", lie)
        began, left = world.clock.now(), count(100, -1)
        await device.run(until=lambda step: isinstance(step, events.Waiting) and next(left) == 1)
        assert world.clock.now() - began > 85  # 1 + 2 + … + 512 ms, then 89 of a second: 90

    in_world(tmp_path, test)


def test_updates_that_are_trained_and_refused_again_and_again_come_ever_more_seldom(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test(world: World) -> None:
        device, transport = world.device(before=failing(refusal(Code.STALE), "upload", times=12))
        monkeypatch.setattr(transport, "check_in", await _granting(device))
        dropped = await twelve(world, device, events.Dropped)
        assert all(0 < pause <= 2.0**number for number, pause in enumerate(dropped))
        assert max(dropped) > 60

    in_world(tmp_path, test)


def test_leases_that_are_over_when_they_come_do_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(world: World) -> None:
        device, transport = world.device()
        monkeypatch.setattr(transport, "check_in", await _granting(device, expires_in_s=0.0))
        dropped = await twelve(world, device, events.Dropped)
        assert all(pause > 0 for pause in dropped)
        assert max(dropped) > 60

    in_world(tmp_path, test)


def test_versions_to_judge_without_end_do_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(world: World) -> None:
        device, transport = world.device()
        plan, leases = (await _work(device)).plan, count(1)

        async def lie(_: CheckIn | AsTold) -> CheckInAnswer:
            return Judge(
                lease=f"{next(leases):032x}",
                expires_in_s=60.0,
                task=SPEC.name,
                seed=0,
                bundle=plan.bundle,
                version=plan.version,
                version_number=1,
                before=plan.version,
                examples=5,
            )

        async def taken(_lease: str, _verdict: Verdict) -> None:
            pass

        monkeypatch.setattr(transport, "check_in", lie)
        monkeypatch.setattr(transport, "judge", taken)
        judged = await twelve(world, device, events.Judged)
        assert all(pause > 0 for pause in judged)
        assert max(judged) > 60

    in_world(tmp_path, test)
