"""One arm lived on the fleet, and what its devices sent and received."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from statistics import fmean

import msgspec
from msgspec import Struct

from benchmarks.claims.case import Point, bundle_of, fleet_of
from benchmarks.claims.data import DataSet, prepared
from benchmarks.claims.plan import Case
from benchmarks.harness import ROOT
from edge_client.bundle import open_bundle
from fedtt.codec import CodecSpec
from fleet.batched import BatchedPool
from fleet.experiment import prepare
from fleet.pools import open_pool
from fleet.run import run_fleet
from fleet.run_files import VersionLine

__all__ = ["ArmResult", "Arms"]

WORK = ROOT / ".bench" / "uplink"
JUDGED_ROWS = 1500


class ArmResult(Struct, frozen=True, kw_only=True):
    """One line of the results file; bytes are of bodies, frames of updates alone."""

    arm: str
    seed: int
    method: str
    codec: CodecSpec
    trained_numbers: int
    rounds: int
    participations: int
    frame_bytes_mean: float
    frame_bytes_worst: int
    sent_bytes_mean: float  #: of a participation, with its check-ins
    received_bytes_mean: float  #: without the bundle
    curve: list[Point]
    wall_s: float


class _Kept:
    """A pool that outlives the runs that use it, with what it remembers of the frozen blocks."""

    def __init__(self, inner: BatchedPool) -> None:
        self._inner = inner
        self.runtime, self.submit = inner.runtime, inner.submit

    def close(self) -> None:
        """The next run goes on with it."""


class Arms:
    """Runs arms one after another."""

    def __init__(self) -> None:
        self._pool: tuple[Path, _Kept] | None = None

    def run(self, case: Case) -> ArmResult:
        data = _judged_rows(prepared(case.set.name))
        bundle = bundle_of(case, data)
        spec = fleet_of(case, data, bundle)
        directory = WORK / "runs" / f"{case.arm.name}-{case.seed}".replace(" ", "-").replace(",", "")
        lines: list[VersionLine] = []
        outcome = run_fleet(
            prepare(spec), directory, on_version=lines.append, pool=self._opened(bundle, spec.fleet.model)
        )
        frames = _frames(directory / "participations.jsonl")
        shutil.rmtree(directory)
        return ArmResult(
            arm=case.arm.name,
            seed=case.seed,
            method=str(spec.task.method.__struct_config__.tag),
            codec=spec.task.codec,
            trained_numbers=open_bundle(bundle).manifest.adapter.layout.size,
            rounds=spec.task.rounds.count,
            participations=len(frames),
            frame_bytes_mean=round(fmean(frames), 1),
            frame_bytes_worst=max(frames),
            sent_bytes_mean=round(outcome.sent_bytes / len(frames), 1),
            received_bytes_mean=round(outcome.received_bytes / len(frames), 1),
            curve=[Point.of(line) for line in lines if line.loss is not None],
            wall_s=outcome.wall_s,
        )

    def _opened(self, bundle: Path, model: str | None) -> _Kept:
        if self._pool is None or self._pool[0] != bundle:
            pool = open_pool("batched-onnx", open_bundle(bundle), 1, model)
            assert isinstance(pool, BatchedPool)
            self._pool = bundle, _Kept(pool)
        return self._pool[1]


def _judged_rows(data: DataSet) -> DataSet:
    """Every third row of the test file, by length, so that hardly any padding is computed."""
    path = WORK / "judged.jsonl"
    if not path.is_file():
        rows = [json.loads(line) for line in data.test.read_text().splitlines()]
        chosen = sorted(rows[:: len(rows) // JUDGED_ROWS], key=lambda row: len(row["text"]))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in chosen))
    return DataSet(train=data.train, search=data.search, test=path, labels=data.labels)


def _frames(path: Path) -> list[int]:
    """Bytes of each frame that a device made."""
    columns, *rows = [msgspec.json.decode(line) for line in path.read_bytes().splitlines()]
    at = columns.index("frame_bytes")
    return [row[at] for row in rows if row[at]]
