"""What a device does when something goes wrong, under a virtual clock against the aggregator's service."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path

import numpy as np
import pytest
from msgspec.structs import replace

from edge_client import events
from edge_client.device_config import DeviceConfig
from edge_client.events import Step
from edge_client.examples import ExampleStore
from edge_client.journal import Idle, Leased, Residual, Trained
from edge_client.tokens import Batch
from fedtt.errors import ConfigError, Refused, RuntimeFailure, Unreachable, WireError
from fedtt.layout import Theta
from fedtt.messages import CheckIn, CheckInAnswer, Code, FailureCode, Problem, Receipt, Work
from fedtt.optimiser import TrainingSpec
from fedtt.seams import VersionBody
from fedtt.task import TaskSpec
from storage.records import Lease, LeaseState
from tests.support.device_world import ROUNDS, SPEC, Hook, World, device_world
from tests.support.edge import MeanTarget


def in_world(tmp_path: Path, test: Callable[[World], Awaitable[None]], spec: TaskSpec = SPEC) -> None:
    async def run() -> None:
        async with device_world(tmp_path, spec) as world:
            await test(world)

    asyncio.run(run())


def acknowledged(step: Step) -> bool:
    return isinstance(step, events.Acknowledged)


def trained(step: Step) -> bool:
    return isinstance(step, events.Trained)


def granted(step: Step) -> bool:
    return isinstance(step, events.Granted)


def failing(error: Exception, name: str, times: int = 1) -> Hook:
    """A hook that fails the first calls of a name."""
    left = [error] * times

    def hook(called: str) -> None:
        if called == name and left:
            raise left.pop()

    return hook


def refusal(code: Code, retry_after_s: float | None = None) -> Refused:
    return Refused(Problem(code=code, detail="no"), retry_after_s)


def lease_of(world: World, lease: str) -> Lease:
    with world.service.store.reading() as tx:
        found = tx.lease(lease)
    assert found is not None
    return found


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


def test_a_busy_server_is_left_alone_as_long_as_it_asks(tmp_path: Path) -> None:
    async def test(world: World) -> None:
        device, transport = world.device(before=failing(refusal(Code.BUSY, 120.0), "upload"))
        await device.run(until=acknowledged)
        (retry,) = [event for event in world.seen if isinstance(event, events.Retrying)]
        assert 120 <= retry.pause_s <= 121
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


class Failing(MeanTarget):
    """A runtime that cannot."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error = error

    def gradient(self, theta: Theta, batch: Batch) -> tuple[float, Theta]:
        raise self.error


def test_a_graph_that_fails_gives_the_lease_back_without_telling_why(tmp_path: Path) -> None:
    async def test(world: World) -> None:
        world.runtime = Failing(RuntimeFailure("out of memory in /home/anna"))
        device, transport = world.device()
        step = await device.run(until=lambda step: isinstance(step, events.GaveUp))
        assert isinstance(step, events.GaveUp)
        assert (step.code, step.detail) == (FailureCode.RUNTIME, "out of memory in /home/anna")
        (failure,) = transport.failures
        assert (failure.code, failure.detail) == (FailureCode.RUNTIME, "")
        assert lease_of(world, step.lease).state is LeaseState.FAILED
        assert device.journal.state.phase == Idle()

    in_world(tmp_path, test)


def test_unusable_examples_give_the_lease_back_and_stay_private(tmp_path: Path) -> None:
    async def test(world: World) -> None:
        world.examples = ExampleStore(None)
        world.examples.add("call my doctor", "a very private label")
        device, transport = world.device()
        step = await device.run(until=lambda step: isinstance(step, events.GaveUp))
        assert isinstance(step, events.GaveUp)
        assert step.code is FailureCode.NO_EXAMPLES
        assert "a very private label" in step.detail
        assert transport.failures[0].detail == ""

    in_world(tmp_path, test)


def test_a_diverged_training_gives_the_lease_back(tmp_path: Path) -> None:
    async def test(world: World) -> None:
        device, transport = world.device()
        await device.run(until=lambda step: isinstance(step, events.GaveUp))
        assert transport.failures[0].code is FailureCode.NOT_FINITE

    training = TrainingSpec(optimiser="sgd", learning_rate=10, local_steps=300)
    in_world(tmp_path, test, replace(SPEC, training=training))


def test_a_server_that_cannot_be_told_of_a_failure_does_not_hold_the_device_up(tmp_path: Path) -> None:
    async def test(world: World) -> None:
        world.runtime = Failing(RuntimeFailure("no"))
        device, _ = world.device(before=failing(Unreachable("gone"), "fail"))
        step = await device.run(until=lambda step: isinstance(step, events.GaveUp))
        assert isinstance(step, events.GaveUp)
        assert step.detail == "no (the server could not be told)"
        assert device.journal.state.phase == Idle()

    in_world(tmp_path, test)


def test_a_version_that_is_not_what_its_name_says_is_not_trained(tmp_path: Path) -> None:
    async def test(world: World) -> None:
        device, transport = world.device()

        async def damaged(sha256: str, limit_bytes: int, held: str | None = None) -> VersionBody:
            return VersionBody(data=bytes(limit_bytes)[:-1] + b"x")

        transport.version = damaged  # type: ignore[method-assign]  # a proxy that damages what it carries
        step = await device.run(until=lambda step: isinstance(step, events.GaveUp))
        assert isinstance(step, events.GaveUp)
        assert step.code is FailureCode.BUNDLE
        assert "does not match its sha256" in step.detail

    in_world(tmp_path, test)


@pytest.mark.parametrize(
    "changes",
    [
        {"live": (999,)},  # factors of a larger layout
        {"rank": 4096},
        {"live": tuple(range(300))},
    ],
)
def test_a_plan_for_another_layout_than_its_bundles_is_given_back_untrained(
    tmp_path: Path, changes: dict[str, object]
) -> None:
    async def test(world: World) -> None:
        device, transport = world.device()
        honest = transport.check_in

        async def lying(message: CheckIn) -> CheckInAnswer:
            answer = await honest(message)
            assert isinstance(answer, Work)
            return replace(answer, plan=replace(answer.plan, **changes))

        transport.check_in = lying  # type: ignore[method-assign]
        step = await device.run(until=lambda step: isinstance(step, events.GaveUp))
        assert isinstance(step, events.GaveUp)
        assert step.code is FailureCode.BUNDLE
        assert "\n" not in step.detail
        assert device.journal.state.phase == Idle()
        assert not world.runtime.batches  # type: ignore[attr-defined]

    in_world(tmp_path, test)


@pytest.mark.parametrize("error", [Unreachable("broke off"), WireError("not the protocol")])
@pytest.mark.parametrize("call", ["version", "bundle_file"])
def test_a_download_that_breaks_off_is_tried_again_under_the_same_lease(
    tmp_path: Path, call: str, error: Exception
) -> None:
    async def test(world: World) -> None:
        device, transport = world.device(before=failing(error, call, times=2))
        await device.run(until=acknowledged)
        assert world.kinds() == ["Enrolled", "Granted", "Retrying", "Retrying", "Trained", "Acknowledged"]
        assert transport.calls.count("check_in") == 1

    in_world(tmp_path, test)


def test_a_bundle_the_server_has_lost_gives_the_lease_back(tmp_path: Path) -> None:
    async def test(world: World) -> None:
        device, transport = world.device(before=failing(refusal(Code.NOT_FOUND), "bundle_file"))
        await device.run(until=lambda step: isinstance(step, events.GaveUp))
        assert transport.failures[0].code is FailureCode.BUNDLE

    in_world(tmp_path, test)


def test_a_training_that_kills_the_process_each_time_is_given_back(tmp_path: Path) -> None:
    class KilledError(BaseException):
        pass

    async def test(world: World) -> None:
        world.runtime = Failing(KilledError())  # type: ignore[arg-type]  # out of memory is no Exception either
        for _ in range(3):
            device, _ = world.device()
            with pytest.raises(KilledError):
                await device.run()
        device, transport = world.device()
        step = await device.step()
        assert isinstance(step, events.GaveUp)
        assert step.detail == "training was cut short 3 times"
        assert [failure.code for failure in transport.failures] == [FailureCode.OTHER]

    in_world(tmp_path, test)


def test_cancelling_stops_training_at_its_next_batch_and_costs_no_attempt(tmp_path: Path) -> None:
    class Slow(MeanTarget):
        def __init__(self) -> None:
            super().__init__()
            self.begun, self.go_on = threading.Event(), threading.Event()

        def gradient(self, theta: Theta, batch: Batch) -> tuple[float, Theta]:
            self.begun.set()
            self.go_on.wait(10)
            return super().gradient(theta, batch)

    async def test(world: World) -> None:
        slow = Slow()
        world.runtime = slow
        device, _ = world.device()
        run = asyncio.create_task(device.run())
        await asyncio.to_thread(slow.begun.wait, 10)
        run.cancel()
        await asyncio.sleep(0.01)
        assert not run.done(), "it waits for the batch in progress"
        slow.go_on.set()
        with pytest.raises(asyncio.CancelledError):
            await run
        assert len(slow.batches) == 1
        phase = device.journal.state.phase
        assert isinstance(phase, Leased)
        assert phase.attempts == 0
        device, transport = world.device()
        await device.run(until=acknowledged)
        assert transport.frames[0][0] == phase.work.lease

    in_world(tmp_path, test)


def test_the_frame_is_on_disk_before_it_is_sent(tmp_path: Path) -> None:
    async def test(world: World) -> None:
        found: list[object] = []

        def look(name: str) -> None:
            if name == "upload":
                found.append(device.journal.state.phase)

        device, transport = world.device(before=look)
        await device.run(until=acknowledged)
        (phase,) = found
        assert isinstance(phase, Trained)
        assert transport.frames == [(phase.lease, phase.frame)]

    in_world(tmp_path, test)
