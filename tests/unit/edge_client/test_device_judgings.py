"""Versions judged on a device's own examples: what fails, is cancelled, or is cut short."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from msgspec.structs import replace

from edge_client import events
from edge_client.journal import Idle
from fedtt.messages import AsTold, CheckIn, CheckInAnswer, FailureCode, Judge, Verdict, Wait
from fedtt.wire import encode_theta, version_digest
from tests.support.device_world import Hooked, World, in_world
from tests.support.edge import panicking_tokenizer
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
        self._transport = transport
        transport.check_in, transport.judge = self.check_in, self.judge  # type: ignore[method-assign]

    async def check_in(self, message: CheckIn | AsTold) -> CheckInAnswer:
        if self.verdicts or self._transport.failures:
            return Wait(retry_after_s=10.0)
        return self.question

    async def judge(self, lease: str, verdict: Verdict) -> None:
        assert lease == self.question.lease
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
