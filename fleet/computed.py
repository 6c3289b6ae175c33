"""What a run has computed, kept so that it can be killed: its trainings and its evaluations.

A run is repeatable, so going on with it means living it again from the start, with what was computed taken
from here: the rest is as if it had never ended. All trainings that a pool computes together are kept
together, so that the next batch, too, is the one it would have been, and so is the back end a timing chose.
The bits are the same but for a batched pool of torch over frozen blocks: what those gave of a row is not
kept, and computed anew among other rows it agrees to about 1e-5. In ONNX Runtime it is the same to the bit.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec

from edge_client.bundle import RuntimeName
from edge_client.inference import Evaluation
from edge_client.trainer import LocalUpdate, TrainingRequest
from fedtt.errors import StorageError
from fleet.parcels import Answer, Failed, Updated, answer_of, update_of
from fleet.pool import Handle, Pool

__all__ = ["Computed", "KeepingPool"]

_SCHEMA = """
CREATE TABLE IF NOT EXISTS run (fingerprint TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS trainer (name TEXT NOT NULL);  -- `fleet.pools.name_of` the pool it began with
CREATE TABLE IF NOT EXISTS training (
    number INTEGER PRIMARY KEY,   -- in the order in which devices began to train
    device TEXT NOT NULL,
    version TEXT NOT NULL,        -- sha256 of the factors it began from
    answer BLOB NOT NULL,         -- msgpack of an update without its residual, or of a failure
    residual BLOB                 -- NULL once the device's journal holds a later one
);
CREATE INDEX IF NOT EXISTS training_device ON training (device) WHERE residual IS NOT NULL;
CREATE TABLE IF NOT EXISTS judged (version TEXT PRIMARY KEY, answer BLOB NOT NULL);
"""


class Computed:
    """One file in a run's directory; raises StorageError where it cannot be used."""

    def __init__(self, path: Path) -> None:
        self._path = path
        with self._errors():
            self._db = sqlite3.connect(path, isolation_level=None)
            self._db.execute("PRAGMA journal_mode = WAL")
            self._db.execute("PRAGMA synchronous = NORMAL")
            self._db.executescript(_SCHEMA)

    def belongs_to(self, fingerprint: str) -> bool:
        """Whether it is of the run of this name, or of none yet."""
        with self._errors():
            row = self._db.execute("SELECT fingerprint FROM run").fetchone()
            return row is None or row[0] == fingerprint

    def trainer(self) -> str | None:
        """The name of the pool that the run began with, if it has."""
        with self._errors():
            row = self._db.execute("SELECT name FROM trainer").fetchone()
            return None if row is None else str(row[0])

    def begin(self, fingerprint: str, trainer: str | None) -> None:
        """Be of a run from now on, and of a pool by this name; what was begun stays as it is."""
        with self._errors(), self._transaction():
            self._db.execute("INSERT INTO run SELECT ? WHERE NOT EXISTS (SELECT 1 FROM run)", (fingerprint,))
            if trainer is not None:
                new = "INSERT INTO trainer SELECT ? WHERE NOT EXISTS (SELECT 1 FROM trainer)"
                self._db.execute(new, (trainer,))

    def trainings(self) -> int:
        with self._errors():
            return int(self._db.execute("SELECT count(*) FROM training").fetchone()[0])

    def has(self, number: int, request: TrainingRequest) -> bool:
        """Whether a training was kept; raises StorageError where another one was under its number."""
        with self._errors():
            query = "SELECT device, version FROM training WHERE number = ?"
            row = self._db.execute(query, (number,)).fetchone()
        if row is not None and row != (request.device, request.plan.version):
            raise StorageError(f"{self._path} is not of this run: begin it anew with --fresh")
        return row is not None

    def training(self, number: int) -> LocalUpdate:
        """What was kept; raises again what training raised."""
        with self._errors():
            query = "SELECT answer, residual FROM training WHERE number = ?"
            data, residual = self._db.execute(query, (number,)).fetchone()
            answer: Answer = msgspec.msgpack.decode(data, type=Answer)
        found: LocalUpdate = msgspec.structs.replace(update_of(answer), residual=residual or b"")
        return found

    def keep(self, numbers: dict[int, TrainingRequest], handles: dict[int, Handle]) -> None:
        """Keep the results of handles, all or none."""
        with self._errors(), self._transaction():
            for number, request in numbers.items():
                answer, residual = _outcome(handles[number])
                row = (number, request.device, request.plan.version, msgspec.msgpack.encode(answer), residual)
                self._db.execute("INSERT INTO training VALUES (?, ?, ?, ?, ?)", row)

    def drop_residuals(self, request: TrainingRequest) -> None:
        """Those of a device that its journal, whose residual the request carries, has left behind."""
        with self._errors():
            self._db.execute(
                "UPDATE training SET residual = NULL "
                "WHERE device = ? AND residual IS NOT NULL AND residual <> ?",
                (request.device, request.residual),
            )

    def judged(self, version: str) -> Evaluation | None:
        with self._errors():
            row = self._db.execute("SELECT answer FROM judged WHERE version = ?", (version,)).fetchone()
            return None if row is None else msgspec.msgpack.decode(row[0], type=Evaluation)

    def keep_judged(self, version: str, judged: Evaluation) -> None:
        with self._errors():
            row = (version, msgspec.msgpack.encode(judged))
            self._db.execute("INSERT OR REPLACE INTO judged VALUES (?, ?)", row)

    def close(self) -> None:
        self._db.close()

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            self._db.execute("ROLLBACK")
            raise
        self._db.execute("COMMIT")

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, msgspec.DecodeError) as error:
            raise StorageError(f"{self._path} cannot be used ({error}): check its disk and rights") from None


def _outcome(handle: Handle) -> tuple[Answer, bytes | None]:
    """What came of a training, its residual apart."""
    answer = answer_of(handle)
    if isinstance(answer, Failed):
        return answer, None
    update = answer.update
    return Updated(msgspec.structs.replace(update, residual=b"")), update.residual or None


class KeepingPool:
    """A Pool that asks another one for nothing twice, in this process or the next."""

    def __init__(self, inner: Pool, computed: Computed) -> None:
        self._inner, self._computed = inner, computed
        self._submitted = 0
        self._requests: dict[int, TrainingRequest] = {}  #: outstanding, in order
        self._handles: dict[int, Handle] = {}

    @property
    def runtime(self) -> RuntimeName:
        return self._inner.runtime

    def submit(self, request: TrainingRequest) -> Handle:
        self._submitted += 1
        number = self._submitted
        if not self._computed.has(number, request):
            self._requests[number], self._handles[number] = request, self._inner.submit(request)
            if request.plan.codec.error_feedback:
                self._computed.drop_residuals(request)
        return _Kept(self, number)

    def result(self, number: int) -> LocalUpdate:
        if number in self._handles:  # the pool computes all that are outstanding, so all are kept
            self._computed.keep(self._requests, self._handles)
            self._requests, self._handles = {}, {}
        return self._computed.training(number)

    def cancel(self, number: int) -> None:
        self._requests.pop(number, None)
        if handle := self._handles.pop(number, None):
            handle.cancel()

    def close(self) -> None:
        self._inner.close()


class _Kept:
    def __init__(self, pool: KeepingPool, number: int) -> None:
        self._pool, self._number = pool, number

    def result(self) -> LocalUpdate:
        return self._pool.result(self._number)

    def cancel(self) -> None:
        self._pool.cancel(self._number)
