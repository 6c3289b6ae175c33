"""One run: a fleet for its data, trained and judged on the bench, and what came of it as one line."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct

from benchmarks.claims.bench import Station, open_bench
from benchmarks.claims.data import WORK, DataSet, prepared
from benchmarks.claims.plan import Case
from fedtt.errors import ConfigError
from fedtt.task import read_task
from fleet.experiment import prepare
from fleet.run import run_fleet
from fleet.run_files import VersionLine
from fleet.spec import FleetFile, FleetSpec

__all__ = ["Point", "Result", "fleet_of", "run_case"]


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
    trained_numbers: int
    rounds: int
    participations: int
    curve: list[Point]
    wall_s: float
    sha256: str  #: of the last version
    searched: bool = False
    #: with two labels: test rows by (right label, label found), 00, 01, 10, 11
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
    bench = open_bench(options.pop("base", "minilm"))
    labels = tuple(options.pop("labels", data.labels))
    station = bench.station(options, labels)
    spec = fleet_of(case, data, station, rate)
    directory = WORK / "runs" / f"{case.digest}-{rate:g}"
    lines: list[VersionLine] = []
    outcome = run_fleet(
        prepare(spec), directory, fresh=True, on_version=lines.append, pool=station.pool, judge=station.judge
    )
    if outcome.state != "finished" and not (outcome.state == "ended early" and case.plan.by_time):
        raise RuntimeError(f"{case.key}: the run ended {outcome.state}: {outcome.reason}")
    shutil.rmtree(directory)
    curve = [Point.of(line) for line in lines if line.loss is not None]
    return Result(
        set=case.set.shown,
        partition=case.partition,
        arm=case.arm.name,
        seed=case.seed,
        rate=rate,
        digest=case.digest,
        trained_numbers=station.bundle.manifest.adapter.layout.size,
        rounds=lines[-1].version,
        participations=sum(outcome.outcomes.values()),
        curve=curve,
        wall_s=outcome.wall_s,
        sha256=outcome.sha256 or "",
        searched=case.is_search,
        confusion=None if case.is_search or len(labels) != 2 else _confusion(data, station),
        report={name: float(value) for name, value in (lines[-1].report or {}).items()},
    )


def _confusion(data: DataSet, station: Station) -> tuple[int, int, int, int]:
    """Of the last version, which was judged last."""
    found = station.judge.predicted[-len(data.answers) :]
    pairs = Counter(zip(data.answers, found, strict=True))
    return pairs[0, 0], pairs[0, 1], pairs[1, 0], pairs[1, 1]


def fleet_of(case: Case, data: DataSet, station: Station, rate: float | None = None) -> FleetSpec:
    """The experiment of one run; rate: over the learning rate of its task."""
    plan = case.plan
    task = case.settings("task")
    if rate is not None:
        task["training"] = {**task.get("training", {}), "learning_rate": rate}
    task["rounds"] = dict(task["rounds"])
    if case.is_search:
        task["rounds"]["count"] = min(plan.search_rounds, task["rounds"]["count"])
    raw: dict[str, Any] = {
        "fleet": {"seed": case.seed, **case.settings("fleet")},
        "bundle": str(station.bundle.directory),
        "data": {"train": str(data.train), "partition": plan.partitions[case.partition]},
        "evaluation": {
            "data": str(data.search if case.is_search else data.test),
            "every": task["rounds"]["count"] if case.is_search else plan.judge_every,
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
