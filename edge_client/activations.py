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
        self._held_bytes = 0  #: of all

    def get(self, key: str, shape: tuple[int, int]) -> Half | None:
        with self._guard:
            held = self._known()
            if key not in held:
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
            if (size := kept_bytes(hidden.shape)) > self.limit_bytes:
                return
            held = self._known()
            self._drop(key)
            self._make_room(size)
            if self._write(key, _digest(key, data) + data):
                held[key] = size
                self._held_bytes += size

    def _make_room(self, size: int) -> None:
        while self._held and self._held_bytes + size > self.limit_bytes:
            self._drop(next(iter(self._held)))

    def _known(self) -> OrderedDict[str, int]:
        """What lies in the directory, read once; what does not fit it now is removed."""
        if self._held is None:
            self._held = OrderedDict()
            with suppress(OSError):
                self._directory.mkdir(mode=0o700, exist_ok=True)
                entries = [(entry.stat(), entry) for entry in os.scandir(self._directory)]
                for stat, entry in sorted(entries, key=lambda found: found[0].st_mtime_ns):
                    if entry.name.endswith(".new"):
                        Path(entry).unlink()
                    else:
                        self._held[entry.name] = _occupied(stat.st_size)
            self._held_bytes = sum(self._held.values())
            self._make_room(0)
        return self._held

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
        if (size := self._known().pop(key, None)) is not None:
            self._held_bytes -= size
            with suppress(OSError):
                (self._directory / key).unlink()


def _digest(key: str, data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=_DIGEST_BYTES, key=key.encode()[:64]).digest()


def _occupied(size: int) -> int:
    return -(-size // _BLOCK_BYTES) * _BLOCK_BYTES
