"""Versions judged on a device's own examples: what fails, is cancelled, or is cut short."""

from __future__ import annotations

import asyncio
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from msgspec.structs import replace
from numpy.typing import NDArray

from edge_client import events
from edge_client.device_config import DeviceConfig
from edge_client.journal import Idle, Judging
from edge_client.tokens import Batch
from fedtt.errors import UnavailableError, Unreachable
from fedtt.layout import Theta
from fedtt.messages import AsTold, CheckIn, CheckInAnswer, FailureCode, Judge, Verdict, Wait
from fedtt.wire import encode_theta, version_digest
from tests.support.device_world import Hooked, World, in_world
from tests.support.edge import MeanTarget, panicking_tokenizer
from tests.support.in_process import TOKEN
from tests.support.tiny import tiny_spec

VERSION = version_digest(encode_theta(np.zeros(tiny_spec().layout.size, np.float32)))
QUESTION = Judge(
    lease="9" * 32,
    expires_in_s=600.0,
    task="lights",
    seed=1,
    bundle="0" * 64,
    version=VERSION,
    version_number=1,
    before=VERSION,
    examples=100,
)


class Asked:
    """A server that asks a device one question until it has a verdict or the lease back."""

    def __init__(self, world: World, transport: Hooked, question: Judge = QUESTION) -> None:
        with world.service.store.reading() as tx:
            (task,) = tx.tasks()
        self.question = replace(question, bundle=task.bundle)
        self.verdicts: list[Verdict] = []
        self.fails = 0  #: verdicts that get lost before one arrives
        self._transport = transport
        transport.check_in, transport.judge = self.check_in, self.judge  # type: ignore[method-assign]

    async def check_in(self, message: CheckIn | AsTold) -> CheckInAnswer:
        if self.verdicts or self._transport.failures:
            return Wait(retry_after_s=10.0)
        return self.question

    async def judge(self, lease: str, verdict: Verdict) -> None:
        assert lease == self.question.lease
        if self.fails:
            self.fails -= 1
            raise Unreachable("no network")
        self.verdicts.append(verdict)


def judged(step: events.Step) -> bool:
    return isinstance(step, events.Judged)


def gave_up(step: events.Step) -> bool:
    return isinstance(step, events.GaveUp)


def test_a_bundle_whose_tokenizer_panics_costs_its_question_alone(tmp_path: Path) -> None:
    async def test(world: World) -> None:
        device, transport = world.device()
        asked = Asked(world, transport)
        step = await device.run(until=gave_up)
        assert isinstance(step, events.GaveUp)
        assert "tokenizer.json is not a tokenizer this program can read" in step.detail
        assert [failure.code for failure in transport.failures] == [FailureCode.BUNDLE]
        assert asked.verdicts == []
        assert device.journal.state.phase == Idle()

    in_world(tmp_path, test, tokenizer_file=panicking_tokenizer())


def test_a_file_that_another_cache_removes_behind_its_check_is_had_anew_and_the_version_judged(
    tmp_path: Path,
) -> None:
    async def test(world: World) -> None:
        left = iter([True])

        def remove(name: str) -> None:
            if name == "version" and next(left, False):
                (path,) = world.home.bundles.rglob("tokenizer.json")
                path.unlink()

        device, transport = world.device(after=remove)
        asked = Asked(world, transport)
        await device.run(until=judged)
        assert world.kinds() == ["Enrolled", "Retrying", "Judged"]
        assert len(asked.verdicts) == 1

    in_world(tmp_path, test)


class KilledError(BaseException):
    """The process dies here: out of memory is no Exception either."""


class Dying(MeanTarget):
    def logits(self, theta: Theta, batch: Batch) -> NDArray[np.float32]:
        raise KilledError


class Slow(MeanTarget):
    """Waits in each batch; in the first until it may go on."""

    def __init__(self) -> None:
        super().__init__()
        self.begun, self.go_on, self.count = threading.Event(), threading.Event(), 0

    def logits(self, theta: Theta, batch: Batch) -> NDArray[np.float32]:
        self.count += 1
        self.begun.set()
        assert self.go_on.wait(10)
        time.sleep(0.02)
        return super().logits(theta, batch)


def test_a_judging_that_kills_the_process_each_time_is_given_back(tmp_path: Path) -> None:
    async def test(world: World) -> None:
        world.runtime = Dying()
        for _ in range(3):
            device, transport = world.device()
            Asked(world, transport)
            with pytest.raises(KilledError):
                await device.run()
        device, transport = world.device()
        Asked(world, transport)
        step = await device.run(until=gave_up)
        assert isinstance(step, events.GaveUp)
        assert step.detail.startswith("judging was cut short 3 times")
        assert [failure.code for failure in transport.failures] == [FailureCode.OTHER]

    in_world(tmp_path, test)


def test_a_verdict_that_cannot_be_sent_is_no_judging_cut_short(tmp_path: Path) -> None:
    async def test(world: World) -> None:
        device, transport = world.device()
        asked = Asked(world, transport)
        asked.fails = 5
        await device.run(until=judged)
        assert world.kinds() == ["Enrolled", *["Retrying"] * 5, "Judged"]
        assert device.journal.state.judging == Judging()

    in_world(tmp_path, test)


@pytest.mark.parametrize("before", [Judging(), Judging(lease=QUESTION.lease, attempts=2)])
def test_cancelling_stops_judging_at_its_next_batch_and_costs_no_attempt_and_spares_none(
    before: Judging, tmp_path: Path
) -> None:
    async def test(world: World) -> None:
        world.runtime = slow = Slow()
        device, transport = world.device()
        device.journal.update(judging=before)
        asked = Asked(world, transport)
        run = asyncio.create_task(device.run())
        await asyncio.to_thread(slow.begun.wait, 10)
        assert device.journal.state.judging == Judging(lease=QUESTION.lease, attempts=before.attempts + 1)
        run.cancel()
        await asyncio.sleep(0.01)
        assert not run.done(), "it waits for the batch in progress"
        slow.go_on.set()
        with pytest.raises(asyncio.CancelledError):
            await run
        assert slow.count == 1, "of one batch for each of two versions"
        assert asked.verdicts == []
        assert device.journal.state.judging == before

    in_world(tmp_path, test)


def test_what_cannot_be_read_for_now_costs_judging_no_attempt_and_spares_none(tmp_path: Path) -> None:
    async def test(world: World) -> None:
        attempts: list[int] = []

        class Busy(MeanTarget):
            def logits(self, theta: Theta, batch: Batch) -> NDArray[np.float32]:
                attempts.append(device.journal.state.judging.attempts)
                if len(attempts) <= 5:
                    raise UnavailableError("base.bin cannot be used (Too many open files): raise ulimit -n")
                return super().logits(theta, batch)

        world.runtime = Busy()
        device, transport = world.device()
        device.journal.update(judging=Judging(lease=QUESTION.lease, attempts=2))
        Asked(world, transport)
        await device.run(until=judged)
        assert attempts[:6] == [3] * 6
        assert device.journal.state.judging == Judging()

    in_world(tmp_path, test)


@pytest.mark.parametrize("whose", ["the owner's", "the server's"])
def test_judging_ends_where_its_owner_gives_it_no_more_time_or_nobody_waits_for_it(
    whose: str, tmp_path: Path
) -> None:
    async def test(world: World) -> None:
        world.runtime = slow = Slow()
        slow.go_on.set()
        limit_s = 0.01
        config = DeviceConfig(token=TOKEN, max_training_s=limit_s if whose == "the owner's" else None)
        device, transport = world.device(config=config)
        question = replace(QUESTION, expires_in_s=limit_s) if whose == "the server's" else QUESTION
        asked = Asked(world, transport, question)
        step = await device.run(until=gave_up)
        assert isinstance(step, events.GaveUp)
        assert step.detail.startswith("judging has taken the 0.01 s that it may")
        assert [failure.code for failure in transport.failures] == [FailureCode.TIME]
        assert (slow.count, asked.verdicts) == (1, [])

    in_world(tmp_path, test)


def test_a_question_that_expires_while_its_bundle_comes_is_dropped(tmp_path: Path) -> None:
    async def test(world: World) -> None:
        def late(name: str) -> None:
            if name == "bundle_file":
                world.clock._now += 1000

        device, transport = world.device(after=late)
        Asked(world, transport)
        step = await device.run(until=lambda step: isinstance(step, events.Dropped))
        assert isinstance(step, events.Dropped)
        assert step.reason == "the lease expired while what it judges was loaded, which is kept"

    in_world(tmp_path, test)
