"""Judges that lie: three of ten can neither hold a good version nor release one that is worse."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence
from typing import Any

from msgspec.structs import replace

from benchmarks.faults.devices import CHECK_IN, Device, devices, frame_of
from benchmarks.faults.row import Figures, Outcome, Setting
from benchmarks.faults.server import ServerProcess, task_text
from fedtt.messages import Judge, Judged, Verdict, Work

__all__ = ["run"]

NUMBERS = 100
_ASKED, _LIARS, _WAIT_S = 10, 3, 30.0
_GOOD, _BAD = Judged(loss=0.5, right=200), Judged(loss=1.5, right=100)
_BEST, _WORST = Judged(loss=0.0, right=256), Judged(loss=1e9, right=0)  #: as far as a message may go


async def run(setting: Setting) -> Outcome:
    """By either measure a good version and one that is worse; by accuracy one judge more leaves it out.

    What that one sent does not count, and its place goes to another: else the version had to wait longer.
    """
    counts: Counter[str] = Counter()
    for measure in ("loss", "accuracy"):
        server = ServerProcess(setting.directory / measure / "data")
        evaluation = f'[evaluation]\ndevices = {_ASKED}\nmeasure = "{measure}"\n'
        async with server.running(), devices(_ASKED + 2, server.url, NUMBERS) as (crowd, _):
            await server.open_task(task_text(cohort=1, more=evaluation), NUMBERS)
            for device in crowd:
                await device.enroll(server.token)
            for is_good in (True, False):
                state = await _judged(server, crowd, is_good=is_good, blanks=int(measure == "accuracy"))
                counts[f"{'good' if is_good else 'worse'}_{state}"] += 1
    figures: Figures = {"good_held": 0, "good_released": 0, "worse_held": 0, "worse_released": 0, **counts}
    return Outcome(
        figures=figures,
        at_most={"good_held": 0, "worse_released": 0},
        at_least={"good_released": 2, "worse_held": 2},
    )


async def _judged(server: ServerProcess, crowd: Sequence[Device], *, is_good: bool, blanks: int) -> str:
    """One device trains a version, the others judge it, the liars first; what has become of it."""
    trainer = await _trained(crowd)
    number = (await _newest(server, "candidate"))["number"]
    blank = Verdict(examples=256, before=Judged(loss=1.0), after=Judged(loss=1.0))
    lie, truth = (
        Verdict(examples=256, before=before, after=after)
        for before, after in (
            [(_BEST, _WORST), (_BAD, _GOOD)] if is_good else [(_WORST, _BEST), (_GOOD, _BAD)]
        )
    )
    said = [blank] * blanks + [lie] * _LIARS + [truth] * (_ASKED - _LIARS)
    judges = (device for device in crowd if device is not trainer)
    for device, verdict in zip(judges, said, strict=False):
        question = await device.transport.check_in(replace(CHECK_IN, judges=True))
        if isinstance(question, Judge):  # the last is asked only where a place is free again
            await device.transport.judge(question.lease, verdict)
    await _newest(server, "released")  # it, or what stood before it
    return str((await server.task("/versions"))[number]["state"])


async def _trained(crowd: Sequence[Device]) -> Device:
    """The one that the round has invited, once its update is taken."""
    async with asyncio.timeout(_WAIT_S):
        while True:
            for device in crowd:
                work = await device.transport.check_in(CHECK_IN)
                if isinstance(work, Work):
                    await device.transport.upload(work.lease, frame_of(work.plan, NUMBERS, device.number))
                    return device
            await asyncio.sleep(0.05)


async def _newest(server: ServerProcess, state: str) -> Any:
    """The newest version, once it is in this state."""
    async with asyncio.timeout(_WAIT_S):
        while (newest := (await server.task("/versions"))[-1])["state"] != state:
            await asyncio.sleep(0.05)
    return newest
