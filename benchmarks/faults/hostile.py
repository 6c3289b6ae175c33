"""Hostile values: what is not finite is refused, what is huge is bounded, who colludes is outvoted.

The bound on colluders (`benchmarks.faults.colluding`) is on the best of the robust folds, in the worst of the
attacks, over several divisions of the people into devices and those that the model is tried on: one division
alone says little. What each fold loses is among the figures.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.bundles import head_of
from benchmarks.faults.colluding import colluding
from benchmarks.faults.devices import CHECK_IN, Device, Habits, Notes
from benchmarks.faults.row import Figures, Outcome, Setting
from benchmarks.faults.server import ServerProcess, task_text
from fedtt.errors import FedttError, Refused
from fedtt.messages import Code, Work
from fedtt.wire import UpdateHeader, encode_update, layout_tag

__all__ = ["bounded", "refusals", "run"]

NUMBERS = 100
_HONEST, _BOUND, _MOST_EXAMPLES = 9, 1.0, 10
_DIVISIONS = 5  #: of the people into devices and held out
_ROUNDS = 100  #: at 30 the plain mean still rises, and a fold that is only slower seems to lose


async def run(setting: Setting) -> Outcome:
    figures = await refusals(setting) | await bounded(setting)
    return Outcome(
        figures=figures
        | (colluding(setting, 10, 2) if setting.quick else colluding(setting, _ROUNDS, _DIVISIONS)),
        at_most={
            "hostile_taken": 0,
            "server_errors": 0,
            "moved_over_bound": 1.0,
            "points_lost_best_fold": 2.0,  # in its worst attack
        },
        at_least={"hostile_sent": 1, "moved_over_bound": 0.99},
    )


# what is refused


def _frame(work: Work, delta: NDArray[np.float32], payload: bytes | None = None, **header: Any) -> bytes:
    layout = head_of(NUMBERS).layout
    plain: dict[str, Any] = {
        "layout": layout_tag(layout),
        "examples": 1,
        "steps": 1,
        "loss_first": 1.0,
        "loss_last": 0.5,
    }
    coded = delta.tobytes() if payload is None else payload
    return encode_update(UpdateHeader(**plain | header), coded)


def _hostile(work: Work) -> dict[str, bytes]:
    zero = np.zeros(NUMBERS, np.float32)

    def at(place: int, value: float) -> NDArray[np.float32]:
        changed = zero.copy()
        changed[place] = value
        return changed

    signalling = zero.copy()
    signalling.view(np.uint32)[3] = 0x7F80_0001
    return {
        "NaN": _frame(work, at(0, np.nan)),
        "a signalling NaN": _frame(work, signalling),
        "infinity": _frame(work, at(NUMBERS - 1, np.inf)),
        "minus infinity": _frame(work, at(5, -np.inf)),
        "all NaN": _frame(work, np.full(NUMBERS, np.nan, np.float32)),
        "a loss of NaN": _frame(work, zero, loss_first=float("nan")),
        "an infinite loss": _frame(work, zero, loss_last=float("inf")),
        "another layout": _frame(work, zero, layout=bytes(8)),
        "a number too few": _frame(work, zero[:-1]),
        "a number too many": _frame(work, np.zeros(NUMBERS + 1, np.float32)),
        "no numbers": _frame(work, zero[:0]),
        "no examples": _frame(work, zero, examples=0),
        "no steps": _frame(work, zero, steps=0),
        "label counts nobody asked for": _frame(work, zero, label_counts=bytes(20)),
    }


async def refusals(setting: Setting) -> Figures:
    """Send each kind of hostile update; the server stays well and takes an honest one."""
    server, counts = ServerProcess(setting.directory / "refusals" / "data"), Counter[str]()
    async with server.running():
        await server.open_task(task_text(cohort=1000), NUMBERS)
        device = await _enrolled(server, 0)
        async with device:
            work = await _work(device)
            for frame in _hostile(work).values():
                counts["hostile_sent"] += 1
                try:
                    await device.transport.upload(work.lease, frame)
                    counts["hostile_taken"] += 1
                except Refused as error:
                    counts[f"refused_{error.problem.code.value}"] += 1
                    counts["server_errors"] += error.problem.code in {Code.INTERNAL, Code.BUSY}
                except FedttError:
                    counts["server_errors"] += 1
            await device.transport.upload(work.lease, _frame(work, np.ones(NUMBERS, np.float32)))
    return {"hostile_taken": 0, "server_errors": 0, **counts}


# what is bounded


async def bounded(setting: Setting) -> Figures:
    """How far one device moved the model that says it has 2³² examples and sends 1e30 everywhere.

    The bound on an update's norm times the most a device weighs, over all weights, is 1 · 10 / (10 + 9 · 1).
    """
    server = ServerProcess(setting.directory / "bounded" / "data")
    fold = f'[fold]\nkind = "mean"\nnorm_bound = {_BOUND}\nmax_examples = {_MOST_EXAMPLES}\n'
    async with server.running():
        await server.open_task(task_text(cohort=_HONEST + 1, more=fold), NUMBERS)
        for number in range(_HONEST + 1):
            device = await _enrolled(server, number)
            async with device:
                work = await _work(device)
                hostile = number == 3
                value, examples = (1e30, 2**32) if hostile else (0.0, 1)
                delta = np.full(NUMBERS, value, np.float32)
                await device.transport.upload(work.lease, _frame(work, delta, examples=examples))
        theta = await _version_one(server)
    bound = _BOUND * _MOST_EXAMPLES / (_MOST_EXAMPLES + _HONEST)
    return {"moved_over_bound": round(float(np.linalg.norm(theta.astype(np.float64))) / bound, 5)}


async def _version_one(server: ServerProcess) -> NDArray[np.float32]:
    async with asyncio.timeout(30):
        while not (versions := await server.task("/versions"))[1:]:
            await asyncio.sleep(0.05)
    sha256 = versions[1]["sha256"]
    return np.frombuffer((server.data / "blobs" / sha256[:2] / sha256).read_bytes(), "<f4")


async def _enrolled(server: ServerProcess, number: int) -> Device:
    device = Device(number, server.url, NUMBERS, Notes(), Habits())
    await device.enroll(server.token)
    return device


async def _work(device: Device) -> Work:
    answer = await device.transport.check_in(CHECK_IN)
    assert isinstance(answer, Work), answer
    return answer
