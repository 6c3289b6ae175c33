"""A device that is away for days: it asks seldom, keeps what it trained, and goes on where it was."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from edge_client import events
from edge_client.device_config import DeviceConfig
from edge_client.events import Step
from edge_client.journal import Idle
from fedtt.errors import Unreachable
from fedtt.optimiser import TrainingSpec
from fedtt.task import RoundSpec, TaskSpec
from tests.support.device_world import World, device_world, no_hook
from tests.support.in_process import TOKEN

_DAY_S = 86400.0
PATIENT = TaskSpec(
    name="lights",
    rounds=RoundSpec(count=1, cohort=1, deadline_s=10 * _DAY_S),
    training=TrainingSpec(local_steps=2, batch_size=2),
)


def acknowledged(step: Step) -> bool:
    return isinstance(step, events.Acknowledged)


@pytest.mark.parametrize("lost", ["the request", "the answer"])
@pytest.mark.parametrize("first", ["check_in", "bundle_file", "upload"])
def test_after_three_days_without_a_network_one_frame_is_trained_sent_and_taken_once(
    first: str, lost: str, tmp_path: Path
) -> None:
    """first: the call from which on the network is gone."""

    async def test(world: World) -> None:
        back_at, called = world.clock.now() + 3 * _DAY_S, set[str]()

        def offline(name: str) -> None:
            called.add(name)
            if first in called and world.clock.now() < back_at:
                raise Unreachable("no network")

        before, after = (offline, no_hook) if lost == "the request" else (no_hook, offline)
        config = DeviceConfig(token=TOKEN, retry_limit_s=3600.0)
        device, transport = world.device(before, after, config=config)
        await device.run(until=acknowledged)
        pauses = [step.pause_s for step in world.seen if isinstance(step, events.Retrying)]
        assert len(set(transport.frames)) == 1, "the same bytes under the same lease"
        assert max(pauses) <= 3600.0
        assert 72 <= len(pauses) <= 300, "half an hour apart in the mean: 3·24·3600 s / 1800 s = 144"
        assert sum(isinstance(step, events.Trained) for step in world.seen) == 1
        assert world.version()[0] == 1
        assert isinstance(device.journal.state.phase, Idle)
        assert device.journal.state.acknowledged == 1

    async def run() -> None:
        async with device_world(tmp_path, PATIENT) as world:
            await test(world)

    asyncio.run(run())
