"""Trainings that fail, break off or are cancelled, under a virtual clock against the aggregator's service."""

from __future__ import annotations

import asyncio
import re
import time
from pathlib import Path

import pytest
from msgspec.structs import replace

from edge_client import events, leased_work
from edge_client.examples import ExampleStore
from edge_client.journal import Idle, Leased, Trained
from edge_client.tokens import Batch
from fedtt.errors import RuntimeFailure, UnavailableError, Unreachable, WireError
from fedtt.layout import Theta
from fedtt.messages import AsTold, CheckIn, CheckInAnswer, Code, FailureCode, Work
from fedtt.optimiser import TrainingSpec
from fedtt.seams import VersionBody
from storage.records import LeaseState
from tests.support.device_world import (
    SPEC,
    World,
    acknowledged,
    failing,
    in_world,
    lease_of,
    refusal,
)
from tests.support.edge import MeanTarget, SlowTarget, living_tokenizers, panicking_tokenizer


class Failing(MeanTarget):
    """A runtime that cannot."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error = error

    def gradient(self, theta: Theta, batch: Batch) -> tuple[float, Theta]:
        raise self.error


@pytest.mark.parametrize("error", [MemoryError("8 TiB"), OverflowError("2**64"), TypeError("no\nscalar")])
def test_a_bundle_that_fails_as_no_check_foresaw_costs_its_lease_alone(
    tmp_path: Path, error: Exception
) -> None:
    async def test(world: World) -> None:
        world.runtime = Failing(error)
        device, _ = world.device()
        step = await device.run(until=lambda step: isinstance(step, events.GaveUp))
        assert isinstance(step, events.GaveUp)
        text = " ".join(str(error).split())
        assert (step.code, step.detail) == (
            FailureCode.RUNTIME,
            f"training or judging failed with {type(error).__name__}: {text}",
        )

    in_world(tmp_path, test)


def test_a_bundle_whose_tokenizer_panics_costs_its_lease_alone(tmp_path: Path) -> None:
    async def test(world: World) -> None:
        device, transport = world.device()
        step = await device.run(until=lambda step: isinstance(step, events.GaveUp))
        assert isinstance(step, events.GaveUp)
        assert "tokenizer.json is not a tokenizer this program can read" in step.detail
        assert [failure.code for failure in transport.failures] == [FailureCode.BUNDLE]
        assert device.journal.state.phase == Idle()

    in_world(tmp_path, test, tokenizer_file=panicking_tokenizer())


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

        async def lying(message: CheckIn | AsTold) -> CheckInAnswer:
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


@pytest.mark.parametrize("times", [1, 3])
def test_cancelling_stops_training_at_its_next_batch_and_costs_no_attempt(times: int, tmp_path: Path) -> None:
    async def test(world: World) -> None:
        slow = SlowTarget()
        world.runtime = slow
        device, _ = world.device()
        run = asyncio.create_task(device.run())
        await asyncio.to_thread(slow.begun.wait, 10)
        for _ in range(times):
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


def test_what_cannot_be_read_for_now_costs_no_attempt(tmp_path: Path) -> None:
    class Busy(MeanTarget):
        left = 5

        def gradient(self, theta: Theta, batch: Batch) -> tuple[float, Theta]:
            if self.left:
                self.left -= 1
                raise UnavailableError("base.bin cannot be used (Too many open files): raise ulimit -n")
            return super().gradient(theta, batch)

    async def test(world: World) -> None:
        world.runtime = Busy()
        device, transport = world.device()
        await device.run(until=acknowledged)
        assert transport.failures == []
        assert len(transport.frames) == 1

    in_world(tmp_path, test)


def test_training_ends_a_day_after_its_lease_and_its_round(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Slow(MeanTarget):
        def gradient(self, theta: Theta, batch: Batch) -> tuple[float, Theta]:
            time.sleep(0.03)
            return super().gradient(theta, batch)

    async def test(world: World) -> None:
        world.runtime = slow = Slow()
        device, transport = world.device()
        step = await device.run(until=lambda step: isinstance(step, events.GaveUp))
        assert isinstance(step, events.GaveUp)
        assert re.fullmatch(r"training has taken the 0\.\d+ s that it may", step.detail)
        assert [failure.code for failure in transport.failures] == [FailureCode.TIME]
        assert len(slow.batches) < 20

    assert leased_work._LATE_S == 86400.0
    monkeypatch.setattr(leased_work, "_LATE_S", 0.05)
    training = replace(SPEC.training, local_steps=50)
    rounds = replace(SPEC.rounds, deadline_s=0.1, lease_s=0.05)
    in_world(tmp_path, test, replace(SPEC, training=training, rounds=rounds))


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


def test_the_tokenizer_is_read_once_however_many_rounds_are_trained(tmp_path: Path) -> None:
    async def test(world: World) -> None:
        device, _ = world.device()
        with living_tokenizers() as living:
            await device.run(until=acknowledged)
            await device.run(until=acknowledged)
            assert (len(living.read), living.count) == (1, 1)

    in_world(
        tmp_path, test, replace(SPEC, training=TrainingSpec(local_steps=1, batch_size=100))
    )  # of all texts
