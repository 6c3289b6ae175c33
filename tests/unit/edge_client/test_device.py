"""What a device does when something goes wrong, under a virtual clock against the aggregator's service."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from msgspec.structs import replace

from edge_client import events
from edge_client.device_config import DeviceConfig
from edge_client.journal import Idle, Leased, Residual, Trained
from fedtt.errors import ConfigError, Refused, Unreachable
from fedtt.messages import Code, Receipt
from storage.records import LeaseState
from tests.support.device_world import (
    ROUNDS,
    World,
    acknowledged,
    failing,
    granted,
    in_world,
    lease_of,
    refusal,
    trained,
)
from tests.support.edge import MeanTarget


def test_a_device_lives_from_consent_to_the_end_of_the_task(tmp_path: Path) -> None:
    async def test(world: World) -> None:
        device, transport = world.device()
        await device.run(until=lambda step: isinstance(step, events.Waiting) and world.version()[0] == ROUNDS)
        assert world.kinds()[:5] == ["Enrolled", "Granted", "Trained", "Acknowledged", "Granted"]
        assert device.journal.state.acknowledged == ROUNDS
        assert transport.calls.count("upload") == ROUNDS
        assert transport.calls.count("bundle_file") == 5  # manifest, base, two graphs, tokenizer: each once

    in_world(tmp_path, test)


def test_without_consent_nothing_is_sent(tmp_path: Path) -> None:
    async def test(world: World) -> None:
        device, transport = world.device(consent=False)
        with pytest.raises(ConfigError, match="the owner of this device must agree"):
            await device.run()
        assert transport.calls == []

    in_world(tmp_path, test)


def test_without_a_token_the_first_run_says_what_is_missing(tmp_path: Path) -> None:
    async def test(world: World) -> None:
        device, transport = world.device(config=DeviceConfig())
        with pytest.raises(ConfigError, match="an enrolment token from whoever runs the server"):
            await device.run()
        assert transport.calls == []

    in_world(tmp_path, test)


def test_a_wrong_token_is_for_a_person_to_mend(tmp_path: Path) -> None:
    async def test(world: World) -> None:
        device, _ = world.device(config=DeviceConfig(token="wrong"))
        with pytest.raises(Refused, match="bad_token"):
            await device.run()
        assert not device.journal.state.enrolled

    in_world(tmp_path, test)


def test_an_upload_of_unknown_outcome_is_sent_again_with_the_same_bytes(tmp_path: Path) -> None:
    async def test(world: World) -> None:
        lost = failing(Unreachable("the answer was lost"), "upload", times=3)
        device, transport = world.device(after=lost)
        await device.run(until=acknowledged)
        assert world.kinds() == ["Enrolled", "Granted", "Trained", *["Retrying"] * 3, "Acknowledged"]
        assert len(transport.frames) == 4
        assert len(set(transport.frames)) == 1
        assert world.version()[0] == 1

    in_world(tmp_path, test)


def test_retries_wait_longer_and_longer(tmp_path: Path) -> None:
    async def test(world: World) -> None:
        device, _ = world.device(before=failing(Unreachable("no network"), "check_in", times=60))
        await device.run(until=granted)
        waits = [event.pause_s for event in world.seen if isinstance(event, events.Retrying)]
        assert len(waits) == 60
        assert max(waits[:3]) <= 4  # ceilings 1, 2, 4
        assert 300 < max(waits) <= 600

    in_world(tmp_path, test)


@pytest.mark.parametrize(("asked_s", "waited_s"), [(120.0, 120), (math.inf, 86400)])
def test_a_busy_server_is_left_alone_as_long_as_it_asks_and_a_day_at_most(
    asked_s: float, waited_s: int, tmp_path: Path
) -> None:
    async def test(world: World) -> None:
        device, transport = world.device(before=failing(refusal(Code.BUSY, asked_s), "upload"))
        await device.run(until=acknowledged)
        (retry,) = [event for event in world.seen if isinstance(event, events.Retrying)]
        assert waited_s <= retry.pause_s <= waited_s + 1
        assert len(set(transport.frames)) == 1

    in_world(tmp_path, test)


@pytest.mark.parametrize(
    "code",
    [Code.STALE, Code.WRONG_LAYOUT, Code.NOT_FINITE, Code.CONFLICT, Code.UNKNOWN_LEASE, Code.MALFORMED],
)
def test_a_final_refusal_drops_the_update_and_keeps_the_old_residual(tmp_path: Path, code: Code) -> None:
    async def test(world: World) -> None:
        device, _ = world.device()
        await device.run(until=acknowledged)
        old = device.journal.state.residuals
        assert [np.frombuffer(r.data, "<f4").any() for r in old.values()] == [True]
        device, transport = world.device(before=failing(refusal(code), "upload"))
        step = await device.run(until=lambda step: isinstance(step, events.Dropped))
        assert isinstance(step, events.Dropped)
        assert code.value in step.reason
        state = device.journal.state
        assert (state.phase, state.residuals, state.acknowledged) == (Idle(), old, 1)
        assert len(transport.frames) == 1

    in_world(tmp_path, test)


def test_a_lease_that_was_refused_is_given_back_when_it_is_offered_again(tmp_path: Path) -> None:
    async def test(world: World) -> None:
        runtime = MeanTarget()
        world.runtime = runtime
        device, transport = world.device(before=failing(refusal(Code.WRONG_LAYOUT), "upload"))
        step = await device.run(until=lambda step: isinstance(step, events.GaveUp))
        assert isinstance(step, events.GaveUp)
        assert step.lease == transport.frames[0][0]
        assert len(runtime.batches) == 2, "trained once, in two steps"
        assert lease_of(world, step.lease).state is LeaseState.FAILED

    in_world(tmp_path, test)


def test_a_device_the_server_does_not_know_enrols_again_and_sends_the_same_bytes(tmp_path: Path) -> None:
    async def test(world: World) -> None:
        device, transport = world.device(before=failing(refusal(Code.UNKNOWN_DEVICE), "upload"))
        await device.run(until=acknowledged)
        assert world.kinds() == ["Enrolled", "Granted", "Trained", "Retrying", "Enrolled", "Acknowledged"]
        assert len(set(transport.frames)) == 1

    in_world(tmp_path, test)


def test_a_signature_that_is_refused_once_costs_a_wait_and_no_enrolment(tmp_path: Path) -> None:
    async def test(world: World) -> None:
        await world.device()[0].run(until=trained)
        refused = failing(refusal(Code.BAD_SIGNATURE), "upload")
        device, transport = world.device(before=refused, config=DeviceConfig())
        await device.run(until=acknowledged)
        assert world.kinds() == ["Enrolled", "Granted", "Trained", "Retrying", "Acknowledged"]
        assert transport.calls == ["upload", "upload"]
        assert len(set(transport.frames)) == 1

    in_world(tmp_path, test)


def test_a_known_key_enrols_again_without_a_token(tmp_path: Path) -> None:
    async def test(world: World) -> None:
        await world.device()[0].run(until=granted)
        device, _ = world.device(
            before=failing(refusal(Code.UNKNOWN_DEVICE), "upload"), config=DeviceConfig()
        )
        await device.run(until=acknowledged)
        assert world.kinds()[2:] == ["Trained", "Retrying", "Enrolled", "Acknowledged"]

    in_world(tmp_path, test)


def test_a_key_the_server_has_erased_needs_a_new_token(tmp_path: Path) -> None:
    async def test(world: World) -> None:
        device, transport = world.device()
        await device.run(until=acknowledged)
        await transport.leave(erase=True)
        device, transport = world.device(config=DeviceConfig())
        with pytest.raises(ConfigError, match="an enrolment token from whoever runs the server"):
            await device.run()
        assert transport.calls == ["check_in", "enroll"]
        assert not device.journal.state.enrolled

    in_world(tmp_path, test)


def test_a_residual_of_a_later_version_is_not_added_to_an_update(tmp_path: Path) -> None:
    async def test(world: World) -> None:
        device, _ = world.device()
        await device.run(until=granted)
        phase = device.journal.state.phase
        assert isinstance(phase, Leased)
        await device.run(until=trained)
        fresh = device.journal.state.phase
        assert isinstance(fresh, Trained)
        poison = Residual(version_number=7, data=np.ones(len(fresh.residual.data) // 4, "<f4").tobytes())
        device.journal.update(phase=phase, residuals={fresh.residual_key: poison})
        await device.run(until=trained)
        assert device.journal.state.phase == fresh

    in_world(tmp_path, test)


def test_a_retired_device_stops(tmp_path: Path) -> None:
    async def test(world: World) -> None:
        device, transport = world.device()
        await device.run(until=acknowledged)
        await transport.leave(erase=False)
        step = await device.run()
        assert isinstance(step, events.Retired)
        assert not device.journal.state.enrolled

    in_world(tmp_path, test)


def test_a_receipt_for_other_bytes_is_not_believed(tmp_path: Path) -> None:
    async def test(world: World) -> None:
        device, transport = world.device()
        await device.run(until=trained)
        genuine = transport.upload

        async def lying(lease: str, frame: bytes) -> Receipt:
            return replace(await genuine(lease, frame), digest="f" * 64)

        transport.upload = lying  # type: ignore[method-assign]  # a server that confuses devices
        step = await device.step()
        assert isinstance(step, events.Retrying)
        assert "another update" in step.error
        transport.upload = genuine  # type: ignore[method-assign]
        assert acknowledged(await device.step())

    in_world(tmp_path, test)


def test_a_lease_that_ran_out_before_training_is_dropped(tmp_path: Path) -> None:
    async def test(world: World) -> None:
        runtime = MeanTarget()
        world.runtime = runtime
        device, _ = world.device()
        await device.run(until=granted)
        await world.clock.sleep(1001)
        step = await device.step()
        assert isinstance(step, events.Dropped)
        assert "expired" in step.reason
        assert runtime.batches == []

    in_world(tmp_path, test)


def test_a_lease_that_a_download_outlasts_is_not_trained(
    tmp_path: Path,
) -> None:
    async def test(world: World) -> None:
        runtime = MeanTarget()
        world.runtime = runtime

        def crawls(name: str) -> None:
            if name == "bundle_file":
                world.clock._now += 1000

        device, _ = world.device(after=crawls)
        step = await device.run(until=lambda step: isinstance(step, events.Dropped))
        assert isinstance(step, events.Dropped)
        assert "expired while its bundle was loaded" in step.reason
        assert (runtime.batches, device.journal.state.phase) == ([], Idle())
        assert world.kinds() == ["Enrolled", "Granted", "Dropped"]

    in_world(tmp_path, test)
