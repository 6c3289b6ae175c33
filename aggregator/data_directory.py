"""The directory that holds a server's database, blobs and tokens: made when missing, for one server alone."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fedtt.errors import StorageError

__all__ = ["sole_server"]


@contextmanager
def sole_server(directory: Path) -> Iterator[None]:
    """Make the directory and hold its lock, which a crash frees too.

    Raises StorageError where the directory cannot be made or written, or another server runs on it: its
    start would sweep away what the other is just receiving.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        descriptor = os.open(directory / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        raise StorageError(
            f"the data directory {directory} cannot be used: {error.strerror}; choose one with --data"
        ) from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise StorageError(
            f"another server runs on {directory}: stop it, or choose another directory with --data"
        ) from None
    finally:
        os.close(descriptor)
