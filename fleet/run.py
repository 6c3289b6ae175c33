"""Living an experiment: `run_fleet` is what `fedtt fleet run` does, for programs."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from aggregator.admin_versions import version_files
from aggregator.promised import promised
from edge_client.runtime import Scorer
from fedtt.errors import ConfigError, FedttError
from fedtt.messages import Problem, device_id
from fleet.alone import Alone
from fleet.computed import Computed, KeepingPool
from fleet.engine import Fleet, Settings
from fleet.experiment import START_S, Experiment
from fleet.faults import FaultSpec
from fleet.judging import VersionJudge
from fleet.participation import Participations
from fleet.pool import Pool
from fleet.pools import Opener, name_of, open_pool
from fleet.run_files import Outcome, RunFiles, VersionLine, check_unused, own_directory, spread
from fleet.server import TOKEN, FleetServer
from fleet.virtual_time import VirtualTime, at_once
from storage.blobs import MemoryBlobs
from storage.memory import MemoryStore
from storage.records import MAIN, TaskState, UpdateState, Version

__all__ = ["opened", "run_fleet"]

_LAST_S = 3600.0  #: for devices that have sent to hear what became of it, once the task has ended


def run_fleet(
    experiment: Experiment,
    directory: Path,
    *,
    fresh: bool = False,
    on_version: Callable[[VersionLine], None] = lambda line: None,
    stopped: Callable[[], bool] = lambda: False,
    pool: Pool | None = None,
    opener: Opener | None = None,
    judge: Scorer | None = None,
) -> Outcome:
    """Live an experiment to its end, or go on with one that was cut short in this directory.

    fresh: forget what was computed there. stopped: asked again and again; once it says so the run ends and
    can be gone on with. pool: None for the one the fleet file names, as `opener` opens it, or this process.
    judge: runs the bundle's evaluation graph; None for ONNX Runtime.
    Raises ConfigError where the directory is another run's, StorageError where it cannot be used.
    """
    with own_directory(directory), ExitStack() as stack:
        kept = directory / "computed.sqlite"
        if fresh:
            kept.unlink(missing_ok=True)
        elif not kept.exists():
            check_unused(directory)
        computed = Computed(kept)
        stack.callback(computed.close)
        if not computed.belongs_to(experiment.fingerprint):
            raise ConfigError("--dir", str(directory), "the directory of this very run; --fresh begins anew")
        name, inner = (None, pool) if pool else _pool(experiment, computed, opener)
        stack.callback(inner.close)
        computed.begin(experiment.fingerprint, name)  # a start that failed leaves the directory to any run
        files = stack.enter_context(RunFiles.open(directory))
        files.settings(experiment.spec)
        made = _Run if experiment.spec.fleet.bound is None else Alone
        return made(experiment, files, KeepingPool(inner, computed), computed, on_version, judge).live(
            stopped
        )


def _pool(experiment: Experiment, computed: Computed, opener: Opener | None) -> tuple[str, Pool]:
    """The one the fleet file names; a run that is gone on with takes the back end that it began with."""
    open_by = opener or partial(opened, experiment)
    return open_by(computed.trainer() or experiment.spec.fleet.chosen_trainer)


def opened(experiment: Experiment, name: str) -> tuple[str, Pool]:
    """An Opener's answer, in this process."""
    fleet = experiment.spec.fleet
    pool = open_pool(name, experiment.bundle, fleet.threads, fleet.model)
    return name_of(name, pool), pool


class _Run:
    """One experiment under way."""

    def __init__(
        self,
        experiment: Experiment,
        files: RunFiles,
        pool: Pool,
        computed: Computed,
        on_version: Callable[[VersionLine], None],
        judge: Scorer | None,
    ) -> None:
        self._experiment, self._files = experiment, files
        self._tell, self._started = on_version, time.monotonic()
        self._population = experiment.population.anew()
        spec, seed = experiment.spec, experiment.spec.fleet.seed
        self._time = VirtualTime(START_S)
        blobs = MemoryBlobs()
        self._judge = VersionJudge(experiment, computed, blobs, judge)
        self._server = FleetServer(
            self._time,
            MemoryStore(keep_rounds=spec.task.rounds.max_staleness + 2),
            blobs,
            spec=spec.task,
            bundle=spec.bundle,
            seed=seed,
            on_version=self._on_version,
        )
        self._fleet = Fleet(
            Settings(
                seed=seed,
                token=TOKEN,
                spread_s=spec.fleet.first_visits_s or spec.fleet.visit_every_s or spec.task.rounds.retry_s,
                visit_every_s=spec.fleet.visit_every_s,
                needs_memory_mb=spec.fleet.needs_memory_mb,
            ),
            self._population,
            experiment.shards,
            experiment.shared_bundle(),
            pool,
            self._time,
            lambda key: (key, self._server.transport(device_id(key))),
            availability=experiment.availability,
            conditions=experiment.conditions,
            faults=None if spec.faults == FaultSpec() else spec.faults,
            participations=Participations(START_S, files.participation),
            judges=experiment.judges(),
        )
        self._last: VersionLine | None = None
        self._asked_at: int | None = None  #: the round at which all were last asked again
        self._stood_still = False

    def live(self, stopped: Callable[[], bool]) -> Outcome:
        fleet, server, clock = self._fleet, self._server, self._time
        end_s = START_S + self._experiment.spec.fleet.last_s
        self._on_version(server.version)
        fleet.start()
        server.run_clock()
        clock.run(lambda: server.ended or fleet.is_over or self._stands_still() or stopped(), end_s)
        interrupted = not server.ended and stopped()
        if server.ended:
            fleet.close()
            clock.run(lambda: not fleet.awake or stopped(), clock.now() + _LAST_S)
        fleet.stop()
        judged = {} if interrupted else self._judge.judge_devices(server.version.sha256, stopped)
        outcome = self._outcome(interrupted=interrupted)
        if not interrupted:
            self._files.end(outcome, self._population, judged)
            self._files.result(self._result())
        return outcome

    def _stands_still(self) -> bool:
        """Whether nobody can be taken any more: all have been told to wait, and a round waits for anyone.

        Asked a second time at that round: what they were told before may have been of an earlier one.
        """
        if not self._fleet.all_wait or (awaited := self._server.awaited) is None:
            return False
        if awaited != self._asked_at:
            self._asked_at = awaited
            self._fleet.ask_again()
            return False
        self._stood_still = True
        return True

    def _on_version(self, version: Version) -> None:
        books, rounds = self._fleet.participations, self._experiment.spec.task.rounds
        evaluation = self._experiment.spec.evaluation
        last = version.number >= rounds.count
        judged = None
        if evaluation and (last or version.number % evaluation.every == 0):
            judged = self._judge.judge(version.sha256)
        self._last = VersionLine(
            version=version.number,
            round=version.round_number,
            sha256=version.sha256,
            virtual_s=round(self._time.now() - START_S, 3),
            wall_s=round(time.monotonic() - self._started, 3),
            updates=version.updates,
            examples=version.examples,
            staleness=self._staleness(version),
            train_loss_first=version.loss_first,
            train_loss_last=version.loss_last,
            loss=judged.loss if judged else None,
            accuracy=judged.accuracy if judged else None,
            check_ins=books.traffic.check_ins,
            sent_bytes=books.traffic.sent_bytes,
            received_bytes=books.traffic.received_bytes,
            bundle_bytes=books.traffic.bundle_bytes,
            frame_bytes=books.frame_bytes,
            trained=books.trained,
            outcomes=dict(books.outcomes),
            participations=spread(self._population.participations),
            report=version.report,
        )
        self._files.version(self._last)
        self._tell(self._last)

    def _staleness(self, version: Version) -> dict[int, int]:
        if version.round_number is None:
            return {}
        task = self._server.task.id
        with self._server.service.store.reading() as tx:
            base = promised(tx.round(task, MAIN, version.round_number), "a version's round").version_number
            folded = tx.updates(task, MAIN, version.round_number, UpdateState.FOLDED)
            return dict(sorted(Counter(base - update.version_number for update in folded).items()))

    def _result(self) -> dict[str, bytes]:
        server = self._server
        found = at_once(version_files(server.service, server.task.spec.name, server.version.number))
        if isinstance(found, Problem):
            raise FedttError(f"the last version cannot be read: {found.detail}")
        return found

    def _outcome(self, *, interrupted: bool) -> Outcome:
        fleet, server = self._fleet, self._server
        books, population = fleet.participations, self._population
        state, reason = server.task.state.value, server.task.reason
        if interrupted:
            state, reason = "interrupted", ""
        elif server.task.state is TaskState.ACTIVE:
            state, reason = "ended early", self._why_early()
        return Outcome(
            task=server.task.spec.name,
            state=state,
            reason=reason,
            versions=server.version.number,
            sha256=server.version.sha256,
            accuracy=self._last.accuracy if self._last else None,
            loss=self._last.loss if self._last else None,
            virtual_s=round(self._time.now() - START_S, 3),
            wall_s=round(time.monotonic() - self._started, 3),
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
            directory=str(self._files.directory),
        )

    def _why_early(self) -> str:
        fleet = self._fleet
        if fleet.is_over:
            return "no device will come again"
        if self._stood_still:
            return f"no device can be taken any more: {fleet.last_waited_for}"
        return fleet.why_time_was_over
