"""One device's directory, and the switches its owner holds.

identity.key   the device's private key, readable by its owner alone
state          the journal: consent, enrolment, the lease in hand, residuals
examples.db    the data; never leaves the device
bundles/       compiled training steps
activations/   what frozen blocks give of each example, bounded; may be removed at any time
conditions/    plain files in which an app says what Linux does not know (`linux_conditions`)
versions/      the factors downloaded last, so that the next ones may come as a difference
lock           held while a client runs here
paused, stop   empty files by which another process asks the running client to rest or to end
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from edge_client.files import storage_errors, sync_directory, try_lock
from fedtt.errors import StorageError

__all__ = ["Home"]

_LOCK_TRIES = 5  #: `is_running` of another process holds the lock for an instant


class Home:
    """Paths, lock and switches; makes the directory (0700) when it is locked for the first time."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.key = directory / "identity.key"
        self.state = directory / "state"
        self.examples = directory / "examples.db"
        self.bundles = directory / "bundles"
        self.versions = directory / "versions"
        self.activations = directory / "activations"
        self.conditions = directory / "conditions"
        self._lock, self._paused, self._stop = directory / "lock", directory / "paused", directory / "stop"

    @property
    def exists(self) -> bool:
        return self.directory.is_dir()

    def create(self) -> None:
        """Make the directory and those above it, each durably: a power cut must not take the key."""
        with storage_errors(self.directory):
            missing = [path for path in (self.directory, *self.directory.parents) if not path.exists()]
            self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            for path in missing:
                sync_directory(path.parent)

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Be the only client here; raises StorageError where another one runs."""
        self.create()
        for _ in range(_LOCK_TRIES):
            if (descriptor := try_lock(self._lock)) is not None:
                break
            time.sleep(0.05)
        else:
            raise StorageError(
                f"another client is running on {self.directory}: stop it first, or name another --home"
            )
        try:
            yield
        finally:
            os.close(descriptor)

    def is_running(self) -> bool:
        """Whether a client holds the lock now."""
        if not self._lock.exists():
            return False
        descriptor = try_lock(self._lock)
        if descriptor is not None:
            os.close(descriptor)
        return descriptor is None

    def is_paused(self) -> bool:
        return self._paused.exists()

    def pause(self, value: bool) -> None:
        self._switch(self._paused, value)

    def is_stopping(self) -> bool:
        """Whether the running client has been asked to end."""
        return self._stop.exists()

    def stop(self, value: bool) -> None:
        self._switch(self._stop, value)

    def _switch(self, flag: Path, value: bool) -> None:
        with storage_errors(self.directory):
            if value:
                self.create()
                flag.touch(mode=0o600)
            else:
                flag.unlink(missing_ok=True)

    def delete_data(self) -> None:
        """Remove examples, bundles, versions and activations; the caller has closed what reads them."""
        for directory in (self.bundles, self.versions, self.activations):
            shutil.rmtree(directory, ignore_errors=True)
        with storage_errors(self.directory):
            for path in sorted(self.directory.glob("examples.db*"), reverse=True):  # its log before the store
                path.unlink()  # by which the directory is known where this breaks off

    def delete(self) -> None:
        """Remove everything this device ever kept here, and the directory if nothing else is in it."""
        self.delete_data()
        shutil.rmtree(self.conditions, ignore_errors=True)
        with storage_errors(self.directory):
            state = (self.state, self.state.with_name("state.new"))
            for path in (*state, self._paused, self._stop, self.key, self._lock):  # by its key it is known
                path.unlink(missing_ok=True)
            if not any(self.directory.iterdir()):
                self.directory.rmdir()
