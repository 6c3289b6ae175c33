"""Files that survive a power cut, locks that a crash releases, and disk errors a person can act on."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from fedtt.errors import DiskFullError, StorageError, UnavailableError

__all__ = ["file_digest", "publish", "storage_errors", "sync_directory", "try_lock", "write_atomically"]

_REMEDIES = {
    errno.EACCES: "give this user write access to it, or name another directory",
    errno.EPERM: "give this user write access to it, or name another directory",
    errno.EROFS: "the file system is read-only: name another directory",
    errno.ENOSPC: "free some space and start again; nothing acknowledged is lost",
    errno.EDQUOT: "free some space and start again; nothing acknowledged is lost",
    errno.EFBIG: "allow this process larger files (ulimit -f); nothing acknowledged is lost",
    errno.EMFILE: "allow this process more open files (ulimit -n); nothing acknowledged is lost",
    errno.ENFILE: "this machine has too many open files; nothing acknowledged is lost",
    errno.ENOTDIR: "a file stands where a directory should be: name another directory",
    errno.EEXIST: "a file stands where a directory should be: name another directory",
}
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_BUSY = {errno.EMFILE, errno.ENFILE}


@contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Turn what the file system says about `path` into a StorageError that says what to do.

    It is a DiskFullError for want of room, and UnavailableError for want of open files: both may pass.
    """
    try:
        yield
    except OSError as error:
        remedy = _REMEDIES.get(error.errno or 0, "check the directory and the disk")
        kind = DiskFullError if error.errno in _FULL else StorageError
        if error.errno in _BUSY:
            kind = UnavailableError
        raise kind(f"{path} cannot be used ({error.strerror or error}): {remedy}") from None


def write_atomically(path: Path, data: bytes) -> None:
    """Replace a file, readable by its owner alone: after a crash it holds the old bytes or the new.

    Raises DiskFullError where there is no room: the old bytes stay, and nothing else does.
    """
    partial = path.with_name(path.name + ".new")
    with storage_errors(path):
        try:
            descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            with os.fdopen(descriptor, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        except OSError:
            with suppress(OSError):
                partial.unlink()
            raise
        publish(partial, path)


def publish(partial: Path, path: Path) -> None:
    """Give a file that is on disk its name, durably."""
    partial.replace(path)
    sync_directory(path.parent)


def sync_directory(directory: Path) -> None:
    """Bring the names in a directory onto the disk."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_digest(path: Path) -> str:
    """sha256 of a file's bytes, in hex."""
    with storage_errors(path), path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def try_lock(path: Path) -> int | None:
    """Hold an advisory lock until the descriptor is closed or the process ends; None where another has it."""
    with storage_errors(path):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            return None
        if not _is_at(path, descriptor):  # whoever held it has removed the file
            os.close(descriptor)
            return None
        return descriptor


def _is_at(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False
