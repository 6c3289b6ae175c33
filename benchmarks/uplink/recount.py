"""What stored runs' devices would send today beside their frames: the runs lived again, without training.

When devices come, wait and send follows from the seed and from bytes, not from what they learn, so check-ins
of a run with made-up updates are those of the run itself, to a few of 4,000: frames differ by some bytes.
Frames, versions and accuracies stay as they were stored.
"""

from __future__ import annotations

import shutil

from msgspec.structs import replace

from benchmarks.claims.bench import open_bench
from benchmarks.claims.case import Point, fleet_of
from benchmarks.claims.data import prepared
from benchmarks.claims.plan import Case
from benchmarks.uplink.arms import WORK, ArmResult
from fleet.experiment import prepare
from fleet.pool import NoopPool
from fleet.run import run_fleet
from fleet.run_files import VersionLine

__all__ = ["recounted"]


def recounted(stored: ArmResult, case: Case) -> ArmResult:
    """The same with other bytes sent beside frames; raises RuntimeError where another number took part."""
    data = prepared(case.set.name, judged_rows=case.plan.test_rows)
    options = case.settings("model")
    bench = open_bench(options.pop("base", "minilm"), options.pop("precision", "fp32"))
    spec = replace(fleet_of(case, data, bench.station(options, data.labels)), evaluation=None)
    directory, lines = WORK / "runs" / "recounted", list[VersionLine]()
    outcome = run_fleet(prepare(spec), directory, fresh=True, on_version=lines.append, pool=NoopPool())
    shutil.rmtree(directory)
    if (found := outcome.outcomes["acknowledged"]) != stored.participations:
        raise RuntimeError(f"{case.key}: {stored.participations} updates were sent, without training {found}")
    sent = {line.version: line.sent_bytes - line.frame_bytes for line in lines} | {0: 0}
    beside = (outcome.sent_bytes - lines[-1].frame_bytes) / found
    return replace(
        stored,
        check_ins_mean=round(outcome.check_ins / found, 2),
        sent_bytes_mean=round(stored.frame_bytes_mean + beside, 1),
        curve=[_moved(point, sent[point.version]) for point in stored.curve],
    )


def _moved(point: Point, beside_bytes: int) -> Point:
    return replace(point, sent_bytes=point.frame_bytes + beside_bytes)
