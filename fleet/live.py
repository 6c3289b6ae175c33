"""A fleet against a server that runs somewhere else, in real time and over HTTP."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from aggregator.coordinator import NO_TASK
from fleet.emulated import SharedBundle
from fleet.engine import Fleet, Settings
from fleet.experiment import Experiment
from fleet.faults import FaultSpec
from fleet.participation import Participations
from fleet.pool import Pool
from fleet.pools import open_pool
from fleet.real_time import OnOneThread, RealTime, check_server, http_connect
from fleet.run_files import Outcome, RunFiles, own_directory

__all__ = ["live_against"]

_LOOK_S = 0.2


async def live_against(
    server: str,
    token: str,
    experiment: Experiment,
    directory: Path,
    stopped: Callable[[], bool] = lambda: False,
    pool: Pool | None = None,
) -> Outcome:
    """Live until the server has no task, `fleet.last_s` has passed, no device is left, or `stopped` says so.

    The server's own task counts, and the fleet file's is not read; its bundle must be the task's.
    Nothing is kept to go on with: devices enrol anew under the same names. Raises StorageError where another
    run is under way in the directory, or it cannot be used; Unreachable or WireError where no aggregator is
    at this address as it starts.
    """
    spec, clock = experiment.spec, RealTime()
    with ExitStack() as stack:
        stack.enter_context(own_directory(directory))
        await check_server(server, clock)
        inner = pool or open_pool(
            spec.fleet.chosen_trainer, experiment.bundle, spec.fleet.threads, spec.fleet.model
        )
        beside, started = OnOneThread(inner), clock.now()
        files = stack.enter_context(RunFiles.open(directory))
        files.settings(spec)
        fleet = Fleet(
            Settings(
                seed=spec.fleet.seed,
                token=token,
                spread_s=spec.fleet.first_visits_s or spec.fleet.visit_every_s or spec.task.rounds.retry_s,
                visit_every_s=spec.fleet.visit_every_s,
                needs_memory_mb=spec.fleet.needs_memory_mb,
            ),
            experiment.population,
            experiment.shards,
            SharedBundle(experiment.bundle, download_bytes=0),
            beside,
            clock,
            http_connect(server, clock),
            availability=experiment.availability,
            conditions=experiment.conditions,
            faults=None if spec.faults == FaultSpec() else spec.faults,
            participations=Participations(started, files.participation),
            judges=experiment.judges(),
            aside=beside.aside,
        )
        wall = time.monotonic()
        try:
            fleet.start()
            state = await _until_over(fleet, clock, started + spec.fleet.last_s, stopped)
        finally:
            fleet.stop()
            await clock.close()
            beside.close()
        outcome = _outcome(experiment, fleet, state, directory, time.monotonic() - wall)
        files.end(outcome, experiment.population)
    return outcome


async def _until_over(fleet: Fleet, clock: RealTime, end_s: float, stopped: Callable[[], bool]) -> str:
    while not clock.failed.done():
        if stopped():
            return "interrupted"
        if fleet.last_waited_for == NO_TASK and not fleet.awake:
            return "finished"
        if fleet.is_over or clock.now() > end_s:
            return "ended early"
        await asyncio.sleep(_LOOK_S)
    clock.failed.result()
    return "ended early"


def _outcome(experiment: Experiment, fleet: Fleet, state: str, directory: Path, wall_s: float) -> Outcome:
    books, population = fleet.participations, experiment.population
    reasons = {
        "finished": fleet.last_waited_for,
        "ended early": "no device will come again" if fleet.is_over else fleet.why_time_was_over,
    }
    return Outcome(
        task=experiment.spec.task.name,
        state=state,
        reason=reasons.get(state, ""),
        versions=None,
        sha256=None,
        accuracy=None,
        loss=None,
        virtual_s=round(wall_s, 3),
        wall_s=round(wall_s, 3),
        devices=population.size,
        took_part=int((population.participations > 0).sum()),
        left_out=dict(fleet.left_out),
        outcomes=dict(books.outcomes),
        steps=books.steps,
        sent_bytes=books.traffic.sent_bytes,
        received_bytes=books.traffic.received_bytes,
        bundle_bytes=books.traffic.bundle_bytes,
        frame_bytes=books.frame_bytes,
        directory=str(directory),
    )
