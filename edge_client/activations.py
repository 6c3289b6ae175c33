"""What the frozen part of a base computed of each example, kept on disk so that it is computed once.

A hint and no more: whatever is missing, damaged or cannot be written is computed again.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections import OrderedDict
from contextlib import suppress
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from fedtt.errors import ConfigError

__all__ = ["Activations", "FileActivations", "Half", "kept_bytes"]

Half = NDArray[np.float16]

_DIGEST_BYTES = 16
_BLOCK_BYTES = 4096  #: of the file system: small files count as much


def kept_bytes(shape: tuple[int, int]) -> int:
    """What one row's hidden state (S, W) takes of the limit."""
    return _occupied(_DIGEST_BYTES + 2 * shape[0] * shape[1])


class Activations(Protocol):
    """Hidden states by a name that says all they depend on."""

    @property
    def limit_bytes(self) -> int:
        """The most that is kept, each row counted as `kept_bytes`."""
        ...

    def get(self, key: str, shape: tuple[int, int]) -> Half | None:
        """What was kept under a name, if it is whole and of this shape."""
        ...

    def put(self, key: str, hidden: Half) -> None:
        """Keep it, if there is room; those used longest ago make way."""
        ...


class FileActivations:
    """One file each: a digest of name and numbers, then the numbers, float16 little-endian.

    Modification times say when each was last used. Nothing is synchronised to disk, as the digest finds what
    a power cut left half written. Whoever uses it holds the lock of its home.
    """

    def __init__(self, directory: Path, limit_bytes: int) -> None:
        if limit_bytes < 0:
            raise ConfigError("activations.limit_bytes", limit_bytes, "a whole number from 0")
        self._directory, self.limit_bytes = directory, limit_bytes
        self._guard = threading.Lock()
        self._held: OrderedDict[str, int] | None = None  #: bytes by name, the one used longest ago first
        self._held_bytes = 0  #: of all, and of what could not be removed
        self._stuck: dict[str, int] = {}  #: bytes of that, by name

    def get(self, key: str, shape: tuple[int, int]) -> Half | None:
        with self._guard:
            held = self._known()
            if held is None or key not in held:
                return None
            data = self._read(key, _DIGEST_BYTES + 2 * shape[0] * shape[1])
            if data is None or data[:_DIGEST_BYTES] != _digest(key, data[_DIGEST_BYTES:]):
                self._drop(key)
                return None
            held.move_to_end(key)
            return np.frombuffer(data, "<f2", offset=_DIGEST_BYTES).reshape(shape)

    def put(self, key: str, hidden: Half) -> None:
        data = hidden.astype("<f2", copy=False).tobytes()
        with self._guard:
            if (size := kept_bytes(hidden.shape)) > self.limit_bytes or (held := self._known()) is None:
                return
            self._drop(key)
            if self._make_room(size) and self._write(key, _digest(key, data) + data):
                held[key] = size
                self._held_bytes += size - self._stuck.pop(key, 0)  # whose place it took

    def _make_room(self, size: int) -> bool:
        """Whether there is room for so many bytes more, once what can be removed for it has gone."""
        while self._held and self._held_bytes + size > self.limit_bytes:
            self._drop(next(iter(self._held)))
        return self._held_bytes + size <= self.limit_bytes

    def _known(self) -> OrderedDict[str, int] | None:
        """What lies in the directory, listed once; what does not fit it now is removed. None where it cannot
        be listed: nothing is kept then, as nobody can say how much there is.
        """
        if self._held is None:
            try:
                self._directory.mkdir(mode=0o700, exist_ok=True)
                names = [path.name for path in self._directory.iterdir()]
            except OSError:
                return None
            found = [(stat, name) for name in names if (stat := self._stat(name)) is not None]
            found.sort(key=lambda entry: entry[0].st_mtime_ns)
            self._held = OrderedDict((name, _occupied(stat.st_size)) for stat, name in found)
            self._held_bytes = sum(self._held.values())
            for name in names:
                if name.endswith(".new"):  # a crash left it
                    self._drop(name)
            self._make_room(0)
        return self._held

    def _stat(self, name: str) -> os.stat_result | None:
        """Of an entry as it lies there; None where it cannot be had, as of one that has just gone."""
        try:
            return os.lstat(self._directory / name)
        except OSError:
            return None

    def _read(self, key: str, size: int) -> bytes | None:
        path = self._directory / key
        try:
            if path.stat().st_size != size:
                return None
            os.utime(path)
            return path.read_bytes()
        except OSError:
            return None

    def _write(self, key: str, data: bytes) -> bool:
        path = self._directory / key
        partial = path.with_name(key + ".new")
        try:
            descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            with os.fdopen(descriptor, "wb") as file:
                file.write(data)
            partial.replace(path)
        except OSError:
            with suppress(OSError):
                partial.unlink()
            return False
        return True

    def _drop(self, key: str) -> None:
        """Remove it; what cannot be removed is not given again, and goes on to count."""
        if self._held is None or (size := self._held.pop(key, None)) is None:
            return
        try:
            (self._directory / key).unlink(missing_ok=True)
        except OSError:
            self._stuck[key] = size
            return
        self._held_bytes -= size


def _digest(key: str, data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=_DIGEST_BYTES, key=key.encode()[:64]).digest()


def _occupied(size: int) -> int:
    return -(-size // _BLOCK_BYTES) * _BLOCK_BYTES
