"""The lives of one client on one home: started, killed in a phase, looked at when it is dead."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np

from benchmarks.faults.server import ServerProcess
from benchmarks.with_parent import WITH_PARENT
from edge_client.bundle import needed_files
from edge_client.home import Home
from edge_client.journal import Leased, State, Trained, read_state
from fedtt.errors import StorageError
from fedtt.manifest import MANIFEST, decode_manifest
from fedtt.messages import Plan

__all__ = ["PHASES", "Lives", "Pace", "phase_of"]

PHASES = ("enrolment", "download", "training", "upload")

_START_S = 60.0  #: the longest a client takes to say something, or to come to a phase
_ROUNDS = 1.5  #: the longest a client lives after its first event, in rounds that nobody disturbs
_POLL_S = 0.001


class Pace(NamedTuple):
    """How long an undisturbed client takes."""

    round_s: float  #: from its first event to its end
    download_s: float  #: from the grant to the bundle's last file
    training_s: float

    def within_s(self, phase: str) -> float:
        """The longest that a client lives on once it is in a phase: most deaths are still in it."""
        of = {"download": self.download_s, "training": self.training_s}
        return 0.7 * of.get(phase, 0.003)


def phase_of(home: Home) -> str:
    """What a client does by its journal: one of PHASES, or "between" them. Raises StorageError."""
    match read_state(home):
        case State(device=device, enrolled=False) if device:
            return "enrolment"
        case State(phase=Leased(work=work, attempts=0)):
            return "between" if _is_there(home.bundles / work.plan.bundle) else "download"
        case State(phase=Leased()):
            return "training"
        case State(phase=Trained()):
            return "upload"
        case _:
            return "between"


def _is_there(directory: Path) -> bool:
    if not (directory / MANIFEST).is_file():
        return False
    manifest = decode_manifest((directory / MANIFEST).read_bytes())
    return all((directory / name).is_file() for name in needed_files(manifest, "onnxruntime"))


class Lives:
    """The lives of one client on one home, and what it said in them."""

    def __init__(self, home: Path, server: ServerProcess, data: Path, counts: Counter[str]) -> None:
        """counts: of all clients together."""
        self.home, self._server, self._data, self._counts = Home(home), server, data, counts
        self._stored: set[str] = set()  #: leases whose frame was found in the journal after a kill
        self.acknowledged: set[str] = set()  #: leases
        self.plan: Plan | None = None  #: the last that was found in the journal after a kill
        self.journal_bytes = self.prefixes = 0
        self.home_over_bundle = 0.0
        self.last_trouble = ""
        self._granted_at = self._download_s = self._training_s = 0.0

    @property
    def state(self) -> State:
        state = read_state(self.home)
        assert state is not None
        return state

    async def live_and_be_killed(self, target: str, rng: np.random.Generator, pace: Pace) -> None:
        """target: one of PHASES, "start", or "anywhere" in the rounds after it."""
        process, reading = await self._start()
        if target in PHASES:
            await self._until(target, process)
            await asyncio.sleep(float(rng.random()) * pace.within_s(target))
        elif target == "start":
            await asyncio.sleep(float(rng.random()) * 1.5)
        else:
            await self._first_event(process)
            await asyncio.sleep(float(rng.random()) * _ROUNDS * pace.round_s)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        await process.wait()
        await reading
        self._counts["ended_by_itself"] += process.returncode != -signal.SIGKILL
        self._look(killed=True)

    async def undisturbed(self) -> Pace:
        """One life that is not killed, until its update is acknowledged."""
        process, reading = await self._start("--once")
        async with asyncio.timeout(_START_S):
            await self._first_event(process)
            began = time.perf_counter()
            await reading
            await process.wait()
        self._look(killed=False)
        return Pace(time.perf_counter() - began, self._download_s, self._training_s)

    async def finish(self, patience_s: float) -> None:
        """Lives that are not killed, until one ends with an acknowledged update and nothing is in hand."""
        before, patience_ends = len(self.acknowledged), time.monotonic() + patience_s
        while time.monotonic() < patience_ends:
            await self.undisturbed()
            if len(self.acknowledged) > before:
                return
            await asyncio.sleep(1.0)  # told to wait for the end of a round whose lease was given back
        self._counts["never_finished"] += 1

    async def _start(self, *more: str) -> tuple[asyncio.subprocess.Process, asyncio.Task[None]]:
        self._began = asyncio.Event()
        options = ("--server", self._server.url, "--token", self._server.token, "--data", str(self._data))
        home = ("--home", str(self.home.directory), "--yes", "--json")
        process = await asyncio.create_subprocess_exec(
            *(*WITH_PARENT, sys.executable, "-m", "fedtt", "client", "run", *options, *home, *more),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
            start_new_session=True,
        )
        assert process.stdout is not None
        return process, asyncio.create_task(self._read(process.stdout))

    async def _first_event(self, process: asyncio.subprocess.Process) -> None:
        """Wait for it, or for an end that nobody asked for."""
        ended = asyncio.create_task(process.wait())
        began = asyncio.create_task(self._began.wait())
        await asyncio.wait([ended, began], timeout=_START_S, return_when=asyncio.FIRST_COMPLETED)
        for task in (ended, began):
            task.cancel()

    async def _until(self, phase: str, process: asyncio.subprocess.Process) -> None:
        """It begins the phase: what an earlier life was killed in is not waited for again."""
        patience_ends, was = time.monotonic() + _START_S, phase_of(self.home)
        while process.returncode is None and time.monotonic() < patience_ends:
            now = phase_of(self.home)
            if now == phase and (now != was or self._began.is_set()):
                return
            was = now
            await asyncio.sleep(_POLL_S)

    async def _read(self, stdout: asyncio.StreamReader) -> None:
        while line := await stdout.readline():
            self._began.set()
            with contextlib.suppress(msgspec.DecodeError):  # a line that the kill cut short
                self._note(msgspec.json.decode(line, type=dict[str, Any]))

    def _note(self, event: dict[str, Any]) -> None:
        match event["event"]:
            case "granted":
                self._granted_at = time.perf_counter()
            case "downloaded":
                self._download_s = time.perf_counter() - self._granted_at
            case "trained":
                self._training_s = event["wall_s"]
                self._counts["trained"] += 1
                self._counts["trained_again"] += event["lease"] in self._stored
                self._counts["prefixes_reused"] += event["prefixes_reused"]
                self._stored.add(event["lease"])
            case "acknowledged":
                self.acknowledged.add(event["receipt"]["lease"])
            case "dropped":
                self._counts["dropped"] += 1
                self._counts["conflicts"] += "conflict" in event["reason"]
            case "gaveup" | "retrying":
                self._counts[event["event"]] += 1
                self.last_trouble = event.get("detail") or event.get("error") or ""
            case _:
                pass

    def _look(self, *, killed: bool) -> None:
        """At the home of a client that is dead."""
        try:
            state, phase = read_state(self.home), phase_of(self.home)
        except StorageError:
            self._counts["unreadable_journals"] += 1
            return
        self._counts[f"killed_in_{phase}"] += killed
        if state is not None and isinstance(state.phase, Trained):
            self._stored.add(state.phase.lease)
        if state is not None and isinstance(state.phase, Leased):
            self.plan = state.phase.work.plan
        files = {path: path.stat().st_size for path in self.home.directory.rglob("*") if path.is_file()}
        bundle_bytes = sum(size for path, size in files.items() if path.is_relative_to(self.home.bundles))
        if phase not in {"enrolment", "download"} and bundle_bytes:
            self.home_over_bundle = max(self.home_over_bundle, sum(files.values()) / bundle_bytes)
        self.journal_bytes = max(self.journal_bytes, files.get(self.home.state, 0))
        kept = [path for path in files if path.is_relative_to(self.home.activations)]
        self._counts["prefixes_cut_short"] += sum(path.suffix == ".new" for path in kept)
        self.prefixes = sum(path.suffix != ".new" for path in kept)
