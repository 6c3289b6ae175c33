"""One arm lived on the fleet, and what its devices sent and received."""

from __future__ import annotations

import shutil
from statistics import fmean

from msgspec import Struct

from benchmarks.claims.bench import open_bench
from benchmarks.claims.case import Point, fleet_of, frames_of
from benchmarks.claims.data import prepared
from benchmarks.claims.plan import Case
from benchmarks.harness import ROOT
from fedtt.codec import CodecSpec
from fleet.experiment import prepare
from fleet.run import run_fleet
from fleet.run_files import VersionLine

__all__ = ["WORK", "ArmResult", "run_arm"]

WORK = ROOT / ".bench" / "uplink"


class ArmResult(Struct, frozen=True, kw_only=True):
    """One line of the results file; bytes are of bodies, frames of updates alone."""

    arm: str
    seed: int
    method: str
    codec: CodecSpec
    trained_numbers: int
    rounds: int  #: that were lived
    participations: int
    frame_bytes_mean: float
    frame_bytes_worst: int
    check_ins_mean: float = 0.0  #: of a participation; 0 of a run stored before they were counted
    sent_bytes_mean: float  #: of a participation, with its check-ins
    received_bytes_mean: float  #: without the bundle
    curve: list[Point]
    wall_s: float


def run_arm(case: Case, until: int | None = None) -> ArmResult:
    """Live one arm to its end, or as far as version `until` of the same run."""
    data = prepared(case.set.name, judged_rows=case.plan.test_rows)
    options = case.settings("model")
    bench = open_bench(options.pop("base", "minilm"), options.pop("precision", "fp32"))
    station = bench.station(options, data.labels)
    spec = fleet_of(case, data, station)
    directory = WORK / "runs" / f"{case.arm.name}-{case.seed}".replace(" ", "-").replace(",", "")
    lines: list[VersionLine] = []
    outcome = run_fleet(
        prepare(spec),
        directory,
        fresh=True,
        on_version=lines.append,
        stopped=lambda: until is not None and bool(lines) and lines[-1].version >= until,
        pool=station.pool,
        judge=station.judge,
    )
    frames = frames_of(directory)
    shutil.rmtree(directory)
    return ArmResult(
        arm=case.arm.name,
        seed=case.seed,
        method=str(spec.task.method.__struct_config__.tag),
        codec=spec.task.codec,
        trained_numbers=station.bundle.manifest.adapter.layout.size,
        rounds=lines[-1].version,
        participations=len(frames),
        frame_bytes_mean=round(fmean(frames), 1),
        frame_bytes_worst=max(frames),
        check_ins_mean=round(outcome.check_ins / len(frames), 2),
        sent_bytes_mean=round(outcome.sent_bytes / len(frames), 1),
        received_bytes_mean=round(outcome.received_bytes / len(frames), 1),
        curve=[Point.of(line) for line in lines if line.loss is not None],
        wall_s=outcome.wall_s,
    )
