"""One run: a fleet for its data, trained and judged on the bench, and what came of it as one line."""

from __future__ import annotations

import hashlib
import json
import shutil
import statistics
import time
from collections import Counter
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct

from benchmarks.claims.bench import Station, open_bench
from benchmarks.claims.data import WORK, DataSet, prepared
from benchmarks.claims.plan import Case
from edge_client.inference import Evaluation, Model
from fedtt.errors import ConfigError
from fedtt.layout import Theta
from fedtt.task import TaskSpec, read_task
from fedtt.wire import encode_theta
from fleet.bounds import Bound, trained_bound
from fleet.experiment import Experiment, prepare
from fleet.run import run_fleet
from fleet.run_files import VersionLine
from fleet.spec import FleetFile, FleetSpec

__all__ = ["Point", "Result", "fleet_of", "frames_of", "run_case"]


class Point(Struct, frozen=True, array_like=True):
    """A judged version; bytes of bodies, of all devices together."""

    version: int
    accuracy: float | None
    loss: float
    frame_bytes: int
    sent_bytes: int
    received_bytes: int
    virtual_s: float

    @classmethod
    def of(cls, line: VersionLine) -> Point:
        """Of a version that was judged."""
        if line.loss is None:
            raise ValueError(f"version {line.version} was not judged")
        sent = line.frame_bytes, line.sent_bytes, line.received_bytes
        return cls(line.version, line.accuracy, line.loss, *sent, line.virtual_s)


class Result(Struct, frozen=True, kw_only=True):
    """One line of a results file."""

    set: str
    partition: str
    arm: str
    seed: int
    rate: float
    digest: str  #: of all that the run follows from but its rate
    trained_numbers: int  #: of all adapters and the head, frozen or not
    rounds: int
    participations: int  #: trainings that ended with a frame; none of what is no federation
    frame_bytes_mean: float = 0.0  #: of a participation, to the run's end; 0 of a line stored before
    received_bytes_mean: float = 0.0  #: the same, of all bodies but bundles
    curve: list[Point]
    wall_s: float
    sha256: str  #: of the last version
    searched: bool = False
    #: with two labels: what was judged, by (right label, label found), 00, 01, 10, 11
    confusion: tuple[int, int, int, int] | None = None
    report: dict[str, float] = {}  #: what the method measured at its last fold

    @property
    def last(self) -> Point:
        return self.curve[-1]

    @property
    def key(self) -> tuple[str, float]:
        return self.digest, self.rate


def run_case(case: Case, rate: float) -> Result:
    data = prepared(case.set.name, train_rows=case.set.train_rows, judged_rows=case.plan.test_rows)
    options = case.settings("model")
    bench = open_bench(options.pop("base", "minilm"), products=options.pop("products", "bfloat16"))
    labels = tuple(options.pop("labels", data.labels))
    station = bench.station(options, labels)
    spec = fleet_of(case, data, station, rate)
    experiment = prepare(spec)
    texts = [example.words for shard in experiment.shards for example in shard.read()]
    if _rows_trained(spec.task) >= len(texts):
        station.remember(texts)
    if case.arm.bound:
        return _bound(case, rate, data, station, experiment)
    directory = WORK / "runs" / f"{case.digest}-{rate:g}"
    station.judge.predicted.clear()
    lines: list[VersionLine] = []
    outcome = run_fleet(
        experiment, directory, fresh=True, on_version=lines.append, pool=station.pool, judge=station.judge
    )
    if outcome.state != "finished" and not (outcome.state == "ended early" and case.plan.by_time):
        raise RuntimeError(f"{case.key}: the run ended {outcome.state}: {outcome.reason}")
    frames = frames_of(directory)
    shutil.rmtree(directory)
    return _result(
        case,
        rate,
        data,
        station,
        rounds=lines[-1].version,
        participations=len(frames),
        frame_bytes_mean=round(statistics.fmean(frames), 1),
        received_bytes_mean=round(outcome.received_bytes / len(frames), 1),
        curve=[Point.of(line) for line in lines if line.loss is not None],
        wall_s=outcome.wall_s,
        sha256=outcome.sha256 or "",
        report={name: float(value) for name, value in (lines[-1].report or {}).items()},
    )


def frames_of(directory: Path) -> list[int]:
    """Bytes of each frame that a device of a run made."""
    lines = (directory / "participations.jsonl").read_bytes().splitlines()
    columns, *rows = [msgspec.json.decode(line) for line in lines]
    at = columns.index("frame_bytes")
    return [row[at] for row in rows if row[at]]


def _rows_trained(task: TaskSpec) -> int:
    return task.rounds.count * task.rounds.cohort * task.training.local_steps * task.training.batch_size


def _bound(case: Case, rate: float, data: DataSet, station: Station, experiment: Experiment) -> Result:
    """Each device by itself, with as many steps as it takes on average, or all rows in one place, with the
    steps of all devices together; of devices what is reported is their mean."""
    rounds, began = experiment.spec.task.rounds.count, time.monotonic()
    bound: Bound = "centralised" if case.arm.bound == "centralised" else "local-only"
    thetas = list(trained_bound(experiment, bound, station.pool))
    judged = [_judged(station, experiment, theta) for theta in thetas]
    accuracies = [found.accuracy for found in judged if found.accuracy is not None]
    mean = statistics.fmean(accuracies) if accuracies else None
    loss = statistics.fmean(found.loss for found in judged)
    report = {"worst_device": min(accuracies), "best_device": max(accuracies)} if accuracies else {}
    return _result(
        case,
        rate,
        data,
        station,
        rounds=rounds,
        participations=0,
        curve=[Point(rounds, mean, loss, 0, 0, 0, 0.0)],
        wall_s=time.monotonic() - began,
        sha256=hashlib.sha256(b"".join(map(encode_theta, thetas))).hexdigest(),
        report=report,
        judgings=len(thetas),
    )


def _judged(station: Station, experiment: Experiment, theta: Theta) -> Evaluation:
    return Model(station.bundle, theta, station.judge).evaluate(experiment.evaluation or ())


def _result(
    case: Case, rate: float, data: DataSet, station: Station, judgings: int = 1, **found: Any
) -> Result:
    labels = station.bundle.manifest.labels
    return Result(
        set=case.set.shown,
        partition=case.partition,
        arm=case.arm.name,
        seed=case.seed,
        rate=rate,
        digest=case.digest,
        trained_numbers=station.bundle.manifest.adapter.layout.size,
        searched=case.is_search,
        confusion=None if case.is_search or len(labels) != 2 else _confusion(data, station, judgings),
        **found,
    )


def _confusion(data: DataSet, station: Station, judgings: int) -> tuple[int, int, int, int]:
    """Of so many that were judged last: the last version, or all devices where each trained by itself."""
    answers = data.answers * judgings
    pairs = Counter(zip(answers, station.judge.predicted[-len(answers) :], strict=True))
    return pairs[0, 0], pairs[0, 1], pairs[1, 0], pairs[1, 1]


def fleet_of(case: Case, data: DataSet, station: Station, rate: float | None = None) -> FleetSpec:
    """The experiment of one run; rate: over the learning rate of its task."""
    plan = case.plan
    task = case.settings("task")
    if rate is not None:
        task["training"] = {**task.get("training", {}), "learning_rate": rate}
    task["rounds"] = dict(task["rounds"])
    if case.is_cut:
        task["rounds"]["count"] = min(plan.search_rounds, task["rounds"]["count"])
    raw: dict[str, Any] = {
        "fleet": {"seed": case.seed, **case.settings("fleet")},
        "bundle": str(station.bundle.directory),
        "data": {"train": str(data.train), "partition": plan.partitions[case.partition]},
        "evaluation": {
            "data": str(data.search if case.is_search else data.test),
            "every": task["rounds"]["count"] if case.is_cut else plan.judge_every,
            "per_device": 0,
        },
    }
    if plan.profiles:
        raw["profiles"] = plan.profiles
    try:
        parts = msgspec.convert(raw, FleetFile, dec_hook=lambda _, value: Path(value))
    except msgspec.ValidationError as error:
        raise ConfigError(plan.title, json.dumps(raw)[:200], str(error)) from None
    spec = read_task({"name": "claim", "seed": case.seed, **task}, plan.title)
    return FleetSpec(task=spec, **{name: getattr(parts, name) for name in FleetFile.__struct_fields__})
