"""A fleet against a server that runs somewhere else, in real time and over HTTP."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from aggregator.coordinator import NO_TASK
from edge_client.events import Granted
from fleet.emulated import SharedBundle
from fleet.engine import Fleet, Settings
from fleet.experiment import Experiment
from fleet.faults import FaultSpec
from fleet.participation import Participations
from fleet.pool import Pool
from fleet.pools import Opener
from fleet.real_time import OnOneThread, RealTime, check_server, http_connect
from fleet.run import opened
from fleet.run_files import Outcome, RunFiles, VersionLine, check_unused, own_directory, spread

__all__ = ["live_against"]

_LOOK_S = 0.2


async def live_against(
    server: str,
    token: str,
    experiment: Experiment,
    directory: Path,
    *,
    fresh: bool = False,
    on_version: Callable[[VersionLine], None] = lambda line: None,
    stopped: Callable[[], bool] = lambda: False,
    pool: Pool | None = None,
    opener: Opener | None = None,
) -> Outcome:
    """Live until the server has no task, `fleet.last_s` has passed, no device is left, or `stopped` says so.

    The server's own task counts, and the fleet file's is not read; its bundle must be the task's.
    Nothing is kept to go on with: devices enrol anew under the same names. A version has a line once a device
    is given it, so the last one has none. fresh: write over what an earlier run left there. Raises
    ConfigError where one has and it is not, StorageError where another run is under way in the directory, or
    it cannot be used; Unreachable or WireError where no aggregator is at this address as it starts.
    """
    spec, clock = experiment.spec, RealTime()
    with ExitStack() as stack:
        stack.enter_context(own_directory(directory))
        if fresh:
            (directory / "computed.sqlite").unlink(missing_ok=True)
        else:
            check_unused(directory)
        await check_server(server, clock)
        inner = pool or (opener or partial(opened, experiment))(spec.fleet.chosen_trainer)[1]
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
            experiment.population.anew(),
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
        wall, shown = time.monotonic(), -1

        def look() -> bool:
            nonlocal shown
            if fleet.newest is not None and fleet.newest.version_number > shown:
                shown = fleet.newest.version_number
                line = _line(fleet, fleet.newest, time.monotonic() - wall)
                files.version(line)
                on_version(line)
            return stopped()

        try:
            fleet.start()
            state = await _until_over(fleet, clock, started + spec.fleet.last_s, look)
        finally:
            fleet.stop()
            await clock.close()
            beside.close()
        outcome = _outcome(experiment, fleet, state, directory, time.monotonic() - wall)
        files.end(outcome, fleet.population)
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


def _line(fleet: Fleet, granted: Granted, wall_s: float) -> VersionLine:
    """What devices know of a version: their own part."""
    books = fleet.participations
    return VersionLine(
        version=granted.version_number,
        round=granted.round,
        sha256="",
        virtual_s=round(wall_s, 3),
        wall_s=round(wall_s, 3),
        updates=0,
        examples=0,
        staleness={},
        train_loss_first=None,
        train_loss_last=None,
        loss=None,
        accuracy=None,
        check_ins=books.traffic.check_ins,
        sent_bytes=books.traffic.sent_bytes,
        received_bytes=books.traffic.received_bytes,
        bundle_bytes=books.traffic.bundle_bytes,
        frame_bytes=books.frame_bytes,
        trained=books.trained,
        outcomes=dict(books.outcomes),
        participations=spread(fleet.population.participations),
        report={},
    )


def _outcome(experiment: Experiment, fleet: Fleet, state: str, directory: Path, wall_s: float) -> Outcome:
    books, population = fleet.participations, fleet.population
    reasons = {
        "finished": fleet.last_waited_for,
        "ended early": "no device will come again" if fleet.is_over else fleet.why_time_was_over,
    }
    return Outcome(
        task=fleet.newest.task if fleet.newest else experiment.spec.task.name,
        state=state,
        reason=reasons.get(state, ""),
        versions=fleet.newest.version_number if fleet.newest else None,
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
        check_ins=books.traffic.check_ins,
        sent_bytes=books.traffic.sent_bytes,
        received_bytes=books.traffic.received_bytes,
        bundle_bytes=books.traffic.bundle_bytes,
        frame_bytes=books.frame_bytes,
        directory=str(directory),
    )
