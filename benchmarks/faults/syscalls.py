"""Death, EIO and ENOSPC at the Nth system call that writes or syncs, for every N of a whole round.

strace counts the calls of each thread and injects the fault: into the ledger's writes (pwrite64, ftruncate),
its syncs (fdatasync), and into what stores blobs (write, fsync, rename). After a death the server is started
again and the round goes on; after an error it has to go on by itself, or, where the error meets its start,
refuse to start in one line. Then the ledger is audited. A round may take a call less than another and so
never meet its fault; such a round is played again, a few times. `deaths` and `struck` count the faults that
were met.
"""

from __future__ import annotations

import asyncio
import re
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from benchmarks.faults.devices import Device, Habits, Notes, devices
from benchmarks.faults.ledger import NOTHING_WRONG, Audit, audit
from benchmarks.faults.row import Outcome, Setting
from benchmarks.faults.server import ServerProcess, task_text
from fedtt.errors import FedttError

__all__ = ["calls_in", "injected", "run", "was_injected"]

NUMBERS = 100
_COHORT = 4
_FAULTS = {
    "pwrite64": ("signal=KILL", "error=EIO", "error=ENOSPC"),
    "fdatasync": ("signal=KILL", "error=EIO", "error=ENOSPC"),
    "ftruncate": ("signal=KILL", "error=EIO"),
    "fsync": ("signal=KILL", "error=EIO", "error=ENOSPC"),
    "write": ("signal=KILL", "error=EIO", "error=ENOSPC"),
    "rename": ("signal=KILL", "error=EIO", "error=ENOSPC"),
}
_STRACE = ("strace", "-f", "-qq")  #: with --seccomp-bpf, strace 6.1 delivers no injected signal
_HABITS = Habits(pause_s=0.01, twice=0.2, together=0.2, other_bytes=0.0, retry_s=0.05)
_MET = 0.95  #: of the faults at least
_COUNTED = 3  #: rounds without faults, in whose middle number of calls each call fails once
_TRIES = 5  #: of a round to meet its fault
_ROUND_S = 20.0  #: for a round with a fault in it, also on a busy machine


async def run(setting: Setting) -> Outcome:
    return await injected(setting, most=12 if setting.quick else None)


async def injected(setting: Setting, *, most: int | None) -> Outcome:
    """most: how many faults are injected, spread evenly over all; None for every one."""
    if shutil.which("strace") is None:
        return Outcome(figures={}, skipped="strace is not installed: apt install strace")
    template = setting.directory / "template" / "data"
    server = ServerProcess(template)
    async with server.running():
        await server.open_task(task_text(cohort=_COHORT, count=1, retry_s=0.05), NUMBERS)
        await server.stop()
    rounds = [await _calls_of_a_round(setting, template, number) for number in range(_COUNTED)]
    calls = Counter({name: sorted(made[name] for made in rounds)[_COUNTED // 2] for name in _FAULTS})
    setting.report.line(row="syscalls", calls=calls)
    faults = list(_faults(calls))
    step = 1 if most is None else max(1, len(faults) // most)
    counts: Counter[str] = Counter()
    for number, (call, fault, when) in enumerate(faults[step // 2 :: step]):
        kills = fault.startswith("signal")
        counts.update(faults=1, kills=int(kills), errors=int(not kills))
        for _ in range(_TRIES):
            trial = _Trial(setting.directory / f"trial-{number}", template, call, fault, when)
            counts.update(rounds=1)
            counts.update(await trial.run())
            if trial.note:
                setting.report.line(row="syscalls", call=call, fault=fault, when=when, note=trial.note)
            shutil.rmtree(trial.directory)
            if trial.met:
                break
        if number % 50 == 49:
            setting.report.line(row="syscalls", faults=number + 1, of=len(faults) // step)
    return Outcome(
        figures={**dict.fromkeys(("not_recovered", "silent_starts", "deaths", "struck"), 0), **counts},
        at_most={**NOTHING_WRONG, "not_recovered": 0, "silent_starts": 0},
        at_least={"faults": 1, "deaths": _MET * counts["kills"], "struck": _MET * counts["errors"]},
    )


def _faults(calls: Counter[str]) -> Iterator[tuple[str, str, int]]:
    for call, faults in _FAULTS.items():
        for fault in faults:
            for when in range(1, calls[call] + 1):
                yield call, fault, when


async def _calls_of_a_round(setting: Setting, template: Path, number: int) -> Counter[str]:
    """How often each call is made in a round without faults, by the thread that makes it most often."""
    directory, log = setting.directory / f"counted-{number}", setting.directory / f"calls-{number}"
    shutil.copytree(template.parent, directory)
    server = ServerProcess(directory / "data", *_STRACE, "-o", str(log), "-e", f"trace={','.join(_FAULTS)}")
    async with server.running(), devices(_COHORT, server.url, NUMBERS, _HABITS) as (peers, notes):
        assert await _round(server, peers, notes)
        await server.stop()
    return calls_in(log.read_text())


def calls_in(log: str) -> Counter[str]:
    """The calls of the thread that makes each most often; strace pads a thread's number with spaces."""
    made = Counter(re.findall(r"^(\d+) +(\w+)\(", log, re.MULTILINE))
    calls: Counter[str] = Counter()
    for (_, call), count in made.items():
        calls[call] = max(calls[call], count)
    return calls


def was_injected(log: str) -> bool:
    """Whether a call met the error that was set for it."""
    return any(line.endswith("(INJECTED)") for line in log.splitlines())


class _Trial:
    """One fault in one round, on a copy of a server's directory."""

    def __init__(self, directory: Path, template: Path, call: str, fault: str, when: int) -> None:
        shutil.copytree(template.parent, directory)
        self.directory, self.note, self.met = directory, "", False
        self._log = directory / "calls"
        inject = ("-o", str(self._log), "-e", f"trace={call}", "-e", f"inject={call}:{fault}:when={when}")
        self._faulty = ServerProcess(directory / "data", *_STRACE, *inject)
        self._kills = fault.startswith("signal")

    async def run(self) -> Counter[str]:
        server = self._faulty
        counts = Counter[str]()
        async with devices(_COHORT, server.url, NUMBERS, _HABITS) as (peers, notes):
            try:
                await server.start()
                done = await _round(server, peers, notes)
            except RuntimeError:
                done = False
                counts["met_at_start"] += 1
                counts["silent_starts"] += not (self._kills or self._said_why())
            died = self._kills and not server.is_running
            if not done and server.is_running:
                counts["not_recovered"] += 1
                self.note = "the server runs and its round does not end"
            await server.stop()
            struck = not self._kills and was_injected(self._log.read_text())
            counts.update(deaths=int(died), struck=int(struck))
            self.met = died or struck
            if not done:
                await self._go_on(peers, notes)
            found = audit(server.data, notes, {p.identity.device: p.number for p in peers}, wiped=False)
        if any(getattr(found, name) for name in NOTHING_WRONG):
            self.note = str(found)
        counts.update({name: int(getattr(found, name)) for name in Audit.__struct_fields__})
        return counts

    def _said_why(self) -> bool:
        last = (self.directory / "server.log").read_text().splitlines()[-1:]
        return bool(last) and last[0].startswith("fedtt: error: ")

    async def _go_on(self, peers: list[Device], notes: Notes) -> None:
        sound = ServerProcess(self._faulty.data)
        for peer in peers:
            await peer.move(sound.url)
        async with sound.running():
            if not await _round(sound, peers, notes):
                self.note = "the round does not end after a new start"
            await sound.stop()


async def _round(server: ServerProcess, peers: list[Device], notes: Notes) -> bool:
    """Let the devices live until the task is finished and all their updates acknowledged; False where not."""
    over = asyncio.Event()
    living = [asyncio.create_task(_live(peer, server.token, over)) for peer in peers]
    try:
        async with asyncio.timeout(_ROUND_S):
            while server.is_running:
                if len(notes.acknowledged) == _COHORT and await _is_finished(server):
                    return True
                await asyncio.sleep(0.02)
    except TimeoutError:
        pass
    finally:
        over.set()
        for task in living:
            task.cancel()
        await asyncio.gather(*living, return_exceptions=True)
    return False


async def _live(peer: Device, token: str, over: asyncio.Event) -> None:
    await peer.enroll(token)
    await peer.live(over)


async def _is_finished(server: ServerProcess) -> bool:
    try:
        return bool((await server.task())["state"] == "finished")
    except FedttError:
        return False
