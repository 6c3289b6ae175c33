"""The fold of a round of 10,000 updates of 20,000 numbers: how long, and in how much memory for how many.

The ledger is a SQLite file whose pages were just written; `seconds` are all that follows the claim: reading,
decoding, the weighted sum and the new factors on disk. `publishing_s` is the transaction that publishes them,
`wiping_s` all those that delete the payloads afterwards, `wiping_most_s` the longest of them: other commits
wait for one at a time.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
from msgspec.structs import replace

from aggregator.folding import sum_round
from aggregator.lifecycle import Lifecycle
from aggregator.promised import promised
from benchmarks.bundles import bundle_of, head_of
from benchmarks.faults.row import Figures, Outcome, Setting
from benchmarks.faults.server import TASK, task_text
from benchmarks.faults.tables import SqliteTables
from benchmarks.serving.load import lease_id
from benchmarks.serving.uploads import give_leases
from edge_client.bundle import Bundle as OpenBundle
from fedtt.codec import CodecSpec, encode_delta
from fedtt.manifest import MANIFEST
from fedtt.task import parse_task
from fedtt.wire import encode_theta
from storage.blobs import FileBlobs, save
from storage.records import MAIN, Bundle, Round, RoundState, Update, UpdateState
from storage.sql import SqlStore

__all__ = ["folded", "run"]

NUMBERS = 20_000
_UPDATES = 10_000
_CODECS = ("int8", "fp32")
_GROWN_MB = 32.0  #: at most, from a sum of few updates to one of many
_DIFFERENT = 64
_LEFT = {
    "folded": "SELECT count(*) FROM updates WHERE state = 'folded' AND folded_into = 1",
    "not_wiped": "SELECT count(*) FROM payloads",
}


async def run(setting: Setting) -> Outcome:
    few, many = (200, 2000) if setting.quick else (_UPDATES // 10, _UPDATES)
    found = await folded(setting, few=few, many=many)
    return replace(
        found,
        figures={**found.figures, "fold_s": found.figures[f"seconds_int8_{many}"], "updates": many},
        at_most={**found.at_most, "fold_s": 2.0},
    )


async def folded(setting: Setting, *, few: int, many: int, codecs: tuple[str, ...] = _CODECS) -> Outcome:
    """Rounds of few and of many updates in each codec; how much more memory the sum of the many takes."""
    figures: Figures = {"folded": 0, "not_wiped": 0}
    for codec in codecs:
        for count in (few, many):
            directory = setting.directory / f"{codec}-{count}"
            found = await asyncio.to_thread(_folded, directory, codec, count)
            setting.report.line(row="fold", codec=codec, updates=count, **found)
            figures |= {f"{key}_{codec}_{count}": value for key, value in found.items()}
            for name, query in _LEFT.items():
                ((rows,),) = SqliteTables(directory / "fedtt.db").rows(query)
                figures[name] = int(figures[name]) + rows
        grown_mb = float(figures[f"peak_mb_{codec}_{many}"]) - float(figures[f"peak_mb_{codec}_{few}"])
        figures[f"peak_mb_grown_{codec}"] = round(grown_mb, 1)
    grown = {f"peak_mb_grown_{codec}": _GROWN_MB for codec in codecs}
    everything = len(codecs) * (few + many)
    return Outcome(figures=figures, at_most={"not_wiped": 0, **grown}, at_least={"folded": everything})


def _folded(directory: Path, codec: str, count: int) -> Figures:
    bundle = bundle_of(directory / "bundle", NUMBERS)
    database, blobs = directory / "fedtt.db", FileBlobs(directory / "blobs")
    with closing(SqlStore.open(database)) as store:
        _open_task(store, blobs, bundle, task_text(codec, cohort=count))
        give_leases(database, count)
        round_ = _upload_all(store, CodecSpec(quantise="int8" if codec == "int8" else "fp32"), count)
        Path("/proc/self/clear_refs").write_text("5")  # begin the peak anew
        before_mb, started, cpu = _status_mb("VmRSS"), time.perf_counter(), time.process_time()
        fold = sum_round(store, blobs, Lifecycle(), round_)
        seconds, cpu_s = time.perf_counter() - started, time.process_time() - cpu
        peak_mb, started = _status_mb("VmHWM") - before_mb, time.perf_counter()
        with store.transaction() as tx:
            assert Lifecycle().publish(tx, time.time(), fold) is not None
        publishing_s = time.perf_counter() - started
        assert len(fold.updates) == count
        wiping_s = list(_wiped(store))
    return {
        "seconds": round(seconds, 3),
        "publishing_s": round(publishing_s, 3),
        "wiping_s": round(sum(wiping_s), 3),
        "wiping_most_s": round(max(wiping_s), 3),
        "cpu_s": round(cpu_s, 3),
        "peak_mb": round(peak_mb, 1),
    }


def _wiped(store: SqlStore) -> Iterator[float]:
    """Seconds of each transaction until no settled payload is left."""
    more = True
    while more:
        started = time.perf_counter()
        more = store.wipe()
        yield time.perf_counter() - started


def _status_mb(name: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1]) / 1024


def _open_task(store: SqlStore, blobs: FileBlobs, bundle: OpenBundle, text: str) -> None:
    manifest = (bundle.directory / MANIFEST).read_bytes()
    first = save(blobs, encode_theta(np.zeros(NUMBERS, np.float32)))
    with store.transaction() as tx:
        tx.put_bundle(Bundle(sha256=bundle.digest, manifest=manifest, added_at=0.0))
        Lifecycle.create(tx, time.time(), parse_task(text), bundle.digest, first, draw_key="0" * 32)


def _upload_all(store: SqlStore, codec: CodecSpec, count: int) -> Round:
    """Every lease answered, and the round claimed."""
    live = head_of(NUMBERS).layout.everything
    rng = np.random.default_rng(0)
    payloads = [
        encode_delta(codec, live, rng.standard_normal(NUMBERS).astype(np.float32), rng)
        for _ in range(_DIFFERENT)
    ]
    with store.transaction() as tx:
        task = promised(tx.task(TASK), "the task")
        round_ = promised(tx.latest_round(task.id, MAIN), "its round")
    for start in range(0, count, 500):
        with store.transaction() as tx:
            for number in range(start, min(start + 500, count)):
                lease = promised(tx.lease(lease_id(number)), "a lease")
                update = Update(
                    sequence=0,
                    lease_id=lease.id,
                    task_id=task.id,
                    branch=MAIN,
                    round_number=round_.number,
                    version_number=0,
                    device_id=lease.device_id,
                    digest=f"{number:064x}",
                    received_at=lease.granted_at,
                    examples=1 + number % 50,
                    loss_first=2.0,
                    loss_last=1.0,
                    state=UpdateState.ACCEPTED,
                    reason="",
                    folded_into=None,
                )
                tx.add_update(update, payloads[number % _DIFFERENT])
    claimed = replace(round_, state=RoundState.FOLDING)
    with store.transaction() as tx:
        tx.put_round(claimed)
    assert not store.wipe()
    assert store.maintain()
    return claimed
