"""The directory that holds a server's database, blobs and tokens: made when missing, locked while in use."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fedtt.errors import StorageError

__all__ = ["server_directory"]


@contextmanager
def server_directory(directory: Path, *, alone: bool = True) -> Iterator[None]:
    """Make the directory and hold its lock, which a crash frees too.

    alone: no other server may run on it, as its database takes one process only. Raises StorageError where
    another does, and where the directory cannot be made or written.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        descriptor = os.open(directory / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        raise StorageError(
            f"the data directory {directory} cannot be used: {error.strerror}; choose one with --data"
        ) from None
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_EX if alone else fcntl.LOCK_SH) | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise StorageError(
            f"another server runs on {directory}: stop it, or choose another directory with --data"
        ) from None
    finally:
        os.close(descriptor)
