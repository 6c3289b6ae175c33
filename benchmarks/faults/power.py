"""Power cuts: what was written and not yet synced is lost, sector by sector, by the throw of a coin.

strace records every write, sync, truncation and renaming of a whole server while devices upload and rounds
are folded. Cut after any of these calls, the disk holds all that was synced before, half of the sectors that
were not, and the first few of the renamings whose directory was not. From each such disk the ledger must
open, sound and with every update that a device had been acknowledged by then.
"""

from __future__ import annotations

import asyncio
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from msgspec import Struct

from benchmarks.faults.devices import Habits, Notes, devices
from benchmarks.faults.ledger import NOTHING_WRONG, audit
from benchmarks.faults.row import Outcome, Setting
from benchmarks.faults.server import ServerProcess, task_text

__all__ = ["cut", "run"]

_NUMBERS = 100
_COHORT, _ROUNDS = 4, 3
_SECTOR_BYTES = 512
_CALLS = "openat,write,pwrite64,fdatasync,fsync,ftruncate,rename,unlink"
_HABITS = Habits(pause_s=0.02, retry_s=0.05)


async def run(setting: Setting) -> Outcome:
    lives, cuts = (1, 40) if setting.quick else (10, 100)
    return await cut(setting, lives=lives, cuts=cuts)


async def cut(setting: Setting, *, lives: int, cuts: int) -> Outcome:
    """lives: of a server that are recorded; cuts: of each."""
    if shutil.which("strace") is None:
        return Outcome(figures={}, skipped="strace is not installed: apt install strace")
    figures: dict[str, float | int | str] = dict.fromkeys(("cuts", "calls", "expected", *NOTHING_WRONG), 0)
    for life in range(lives):
        directory = setting.directory / f"life-{life}"
        data, first, calls, notes, places = await _record(directory)
        figures["calls"] = int(figures["calls"]) + len(calls)
        rng = setting.rng(life)
        for number in range(cuts):
            after = int(rng.integers(1, len(calls) + 1))
            known = Notes()
            known.acknowledged = {
                lease: digest
                for lease, digest in notes.acknowledged.items()
                if notes.acknowledged_at[lease] <= calls[after - 1].at
            }
            image = directory / "image"
            _Disk(data, first).play(calls[:after]).write(image, rng)
            found = audit(image, known, places, ended=False, wiped=False)
            figures["cuts"] = int(figures["cuts"]) + 1
            figures["expected"] = int(figures["expected"]) + len(known.acknowledged)
            for name in NOTHING_WRONG:
                figures[name] = int(figures[name]) + int(getattr(found, name))
            if any(getattr(found, name) for name in NOTHING_WRONG):
                setting.report.line(row="power", life=life, cut=number, after=after, found=str(found))
            shutil.rmtree(image)
        setting.report.line(row="power", lives=life + 1, **figures)
        shutil.rmtree(directory)
    return Outcome(figures=figures, at_most=NOTHING_WRONG, at_least={"cuts": lives * cuts, "expected": cuts})


# recording


class _Call(Struct, frozen=True, kw_only=True):
    """One system call that succeeded."""

    at: float  #: Unix seconds
    name: str
    path: str
    other: str = ""  #: the new name
    data: bytes = b""
    offset: int | None = None  #: or new size; None for the end of what was written before


async def _record(directory: Path) -> tuple[Path, Path, list[_Call], Notes, dict[str, int]]:
    """A server's directory, what was in it before, what it did, and what devices were told meanwhile."""
    data, first, log = directory / "data", directory / "first", directory / "calls"
    server = ServerProcess(data)
    async with server.running():
        await server.open_task(task_text(cohort=_COHORT, count=_ROUNDS, retry_s=0.05), _NUMBERS)
        await server.stop()
    shutil.copytree(data, first)
    options = ("-f", "-qq", "-ttt", "-xx", "-y", "-s", "1000000", "-e", f"trace={_CALLS}", "-o", str(log))
    traced = ServerProcess(data, "strace", *options)
    over = asyncio.Event()
    async with traced.running(), devices(_COHORT, traced.url, _NUMBERS, _HABITS) as (peers, notes):
        await asyncio.gather(*(peer.enroll(traced.token) for peer in peers))
        living = [asyncio.create_task(peer.live(over)) for peer in peers]
        async with asyncio.timeout(60):
            while (await traced.task())["state"] != "finished":
                await asyncio.sleep(0.05)
        over.set()
        await asyncio.gather(*living)
        await traced.stop()
    places = {peer.identity.device: peer.number for peer in peers}
    return data, first, list(_calls(log.read_text(), data)), notes, places


_LINE = re.compile(r"(?P<thread>\d+) +(?P<at>\d+\.\d+) (?P<text>.*)")
_RESUMED = re.compile(r"<\.\.\. \w+ resumed>")
_CALL = re.compile(r"(?P<name>\w+)\((?P<arguments>.*)\) += (?P<result>-?\d+)")
_STRING = re.compile(r'"((?:\\x[0-9a-f]{2})*)"')
_FILE = re.compile(r"^\d+<([^>]*)>")


def _calls(log: str, data: Path) -> Iterator[_Call]:
    """Those on files below `data`, in the order of their ends."""
    begun: dict[str, str] = {}
    for line in log.splitlines():
        found = _LINE.match(line)
        if found is None:
            continue
        thread, text = found["thread"], found["text"]
        if text.endswith("<unfinished ...>"):
            begun[thread] = text.removesuffix("<unfinished ...>")
            continue
        if _RESUMED.match(text):
            text = begun.pop(thread, "") + _RESUMED.sub("", text, count=1)
        call = _CALL.match(text)
        if call is None or int(call["result"]) < 0:
            continue
        read = _read(float(found["at"]), call["name"], call["arguments"])
        if read is not None and read.path.startswith(str(data)):
            yield read


def _read(at: float, name: str, arguments: str) -> _Call | None:
    strings = [_bytes(text) for text in _STRING.findall(arguments)]
    file = _FILE.match(arguments)
    path = _path(file[1]) if file else ""
    match name:
        case "openat" if "O_CREAT" in arguments:
            return _Call(at=at, name="create", path=strings[0].decode())
        case "write":
            return _Call(at=at, name="write", path=path, data=strings[0])
        case "pwrite64":
            offset = int(arguments.rpartition(", ")[2])
            return _Call(at=at, name="write", path=path, data=strings[0], offset=offset)
        case "fdatasync" | "fsync":
            return _Call(at=at, name="sync", path=path)
        case "ftruncate":
            return _Call(at=at, name="truncate", path=path, offset=int(arguments.rpartition(", ")[2]))
        case "rename":
            return _Call(at=at, name="rename", path=strings[0].decode(), other=strings[1].decode())
        case "unlink":
            return _Call(at=at, name="unlink", path=strings[0].decode())
        case _:
            return None


def _bytes(text: str) -> bytes:
    return bytes.fromhex(text.replace("\\x", ""))


def _path(text: str) -> str:
    return _bytes(text).decode() if text.startswith("\\x") else text


# cutting


class _File:
    """Bytes that are safe, and changes since."""

    def __init__(self, data: bytes = b"") -> None:
        self.data, self.end = bytearray(data), len(data)
        self.changes: list[tuple[int, bytes | None]] = []  #: offset and bytes, or a new size and None

    def write(self, data: bytes, offset: int | None) -> None:
        start = self.end if offset is None else offset
        self.end = max(self.end, start + len(data))
        self.changes.append((start, data))

    def truncate(self, size: int) -> None:
        self.end = size
        self.changes.append((size, None))

    def sync(self) -> None:
        for start, data in self.changes:
            _apply(self.data, start, data)
        self.changes.clear()

    def after_a_cut(self, rng: np.random.Generator) -> bytes:
        found = bytearray(self.data)
        for start, data in self.changes:
            if data is None:
                if rng.random() < 0.5:
                    _apply(found, start, None)
                continue
            for at in range(0, len(data), _SECTOR_BYTES):
                if rng.random() < 0.5:
                    _apply(found, start + at, data[at : at + _SECTOR_BYTES])
        return bytes(found)


def _apply(content: bytearray, start: int, data: bytes | None) -> None:
    if data is None:
        del content[start:]
        content.extend(bytes(start - len(content)))
        return
    content.extend(bytes(max(0, start + len(data) - len(content))))
    content[start : start + len(data)] = data


class _Disk:
    """The files of a directory, and names that were changed since their directory was synced."""

    def __init__(self, data: Path, first: Path) -> None:
        self._data = str(data)
        found = [path for path in first.rglob("*") if path.is_file() and not path.name.endswith("-shm")]
        self._files = {f"{data}/{path.relative_to(first)}": _File(path.read_bytes()) for path in found}
        self._names = dict(self._files)  #: that would be there after a cut
        self._pending: list[tuple[str, _File | None]] = []  #: name, and the file it stands for from then on

    def play(self, calls: list[_Call]) -> _Disk:
        for call in calls:
            if not call.path.endswith("-shm"):  # shared memory, which is made anew from the log
                self._play(call)
        return self

    def _play(self, call: _Call) -> None:
        files = self._files
        match call.name:
            case "create" if call.path not in files:
                self._name(call.path, _File())
            case "write" if call.path in files:
                files[call.path].write(call.data, call.offset)
            case "truncate" if call.path in files:
                files[call.path].truncate(call.offset or 0)
            case "sync" if call.path in files:
                files[call.path].sync()
                self._settle(lambda name: name == call.path)  # a synced new file keeps its name, as on ext4
            case "sync":
                self._settle(lambda name: name.rpartition("/")[0] == call.path)
            case "rename":
                file = files.get(call.path, _File())
                self._name(call.path, None)
                self._name(call.other, file)
            case "unlink":
                self._name(call.path, None)
            case _:
                pass

    def _name(self, path: str, file: _File | None) -> None:
        if file is None:
            self._files.pop(path, None)
        else:
            self._files[path] = file
        self._pending.append((path, file))

    def _settle(self, concerns: Callable[[str], bool]) -> None:
        for path, file in [change for change in self._pending if concerns(change[0])]:
            self._rename(self._names, path, file)
        self._pending = [change for change in self._pending if not concerns(change[0])]

    @staticmethod
    def _rename(names: dict[str, _File], path: str, file: _File | None) -> None:
        if file is None:
            names.pop(path, None)
        else:
            names[path] = file

    def write(self, directory: Path, rng: np.random.Generator) -> None:
        """What a cut leaves, as files."""
        names = dict(self._names)
        for path, file in self._pending[: int(rng.integers(0, len(self._pending) + 1))]:
            self._rename(names, path, file)
        directory.mkdir(parents=True)
        for path, file in names.items():
            target = directory / path.removeprefix(self._data + "/")
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(file.after_a_cut(rng))
