"""A disk that is told of system calls, as strace records them, and loses its power after some."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from msgspec import Struct

__all__ = ["CALLS", "Call", "Disk", "calls_in"]

CALLS = "openat,write,pwrite64,fdatasync,fsync,ftruncate,rename,unlink"  #: that it must be told of
_SECTOR_BYTES = 512


class Call(Struct, frozen=True, kw_only=True):
    """One system call that succeeded."""

    at: float  #: Unix seconds
    name: str
    path: str
    other: str = ""  #: the new name
    data: bytes = b""
    offset: int | None = None  #: or new size; None for the end of what was written before


_LINE = re.compile(r"(?P<thread>\d+) +(?P<at>\d+\.\d+) (?P<text>.*)")
_RESUMED = re.compile(r"<\.\.\. \w+ resumed>")
_CALL = re.compile(r"(?P<name>\w+)\((?P<arguments>.*)\) += (?P<result>-?\d+)")
_STRING = re.compile(r'"((?:\\x[0-9a-f]{2})*)"')
_FILE = re.compile(r"^\d+<([^>]*)>")


def calls_in(log: str, data: Path) -> Iterator[Call]:
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


def _read(at: float, name: str, arguments: str) -> Call | None:
    strings = [_bytes(text) for text in _STRING.findall(arguments)]
    file = _FILE.match(arguments)
    path = _path(file[1]) if file else ""
    match name:
        case "openat" if "O_CREAT" in arguments:
            return Call(at=at, name="create", path=strings[0].decode())
        case "write":
            return Call(at=at, name="write", path=path, data=strings[0])
        case "pwrite64":
            offset = int(arguments.rpartition(", ")[2])
            return Call(at=at, name="write", path=path, data=strings[0], offset=offset)
        case "fdatasync" | "fsync":
            return Call(at=at, name="sync", path=path)
        case "ftruncate":
            return Call(at=at, name="truncate", path=path, offset=int(arguments.rpartition(", ")[2]))
        case "rename":
            return Call(at=at, name="rename", path=strings[0].decode(), other=strings[1].decode())
        case "unlink":
            return Call(at=at, name="unlink", path=strings[0].decode())
        case _:
            return None


def _bytes(text: str) -> bytes:
    return bytes.fromhex(text.replace("\\x", ""))


def _path(text: str) -> str:
    return _bytes(text).decode() if text.startswith("\\x") else text


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


class Disk:
    """The files of a directory, and names that were changed since their directory was synced."""

    def __init__(self, data: Path, first: Path) -> None:
        self._data = str(data)
        found = [path for path in first.rglob("*") if path.is_file() and not path.name.endswith("-shm")]
        self._files = {f"{data}/{path.relative_to(first)}": _File(path.read_bytes()) for path in found}
        self._names = dict(self._files)  #: that would be there after a cut
        self._pending: list[tuple[str, _File | None]] = []  #: name, and the file it stands for from then on

    def play(self, calls: list[Call]) -> Disk:
        for call in calls:
            if not call.path.endswith("-shm"):  # shared memory, which is made anew from the log
                self._play(call)
        return self

    def _play(self, call: Call) -> None:
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
