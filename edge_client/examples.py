"""The device's own data: a bounded store that an app adds to while a client trains from it."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from msgspec import Struct

from edge_client.files import storage_errors
from fedtt.errors import ConfigError, DataError, DiskFullError, StorageError
from fedtt.seams import Clock, SystemClock

__all__ = ["Example", "ExampleLimits", "ExampleStore", "Examples", "Shard", "Text", "is_store", "label_index"]

Label = str | int
Text = str | tuple[str, str]  #: one text, or two that are read together

_LARGEST = 2**63 - 1  #: label that a store can hold
_INDEX_DIGITS = 18  #: of a text that may be an index

_CLOCK_ERROR_S = 7 * 86400.0  #: by which a device's clock may be ahead for a while: it deletes nothing young

#: Without room; the second of what a reader needs beside a WAL.
_FULL = {sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR_SHMSIZE}

_MAGIC = b"SQLite format 3\0"  #: what a database begins with

_SCHEMA = """
CREATE TABLE IF NOT EXISTS example (
    id INTEGER PRIMARY KEY,
    text TEXT NOT NULL CHECK (text <> ''),
    text_pair TEXT,               -- the second text of a pair, or NULL
    label,                        -- name (TEXT), index (INTEGER) or NULL; no affinity keeps which
    source TEXT NOT NULL,         -- "file row n", or empty for what an app added
    file TEXT,                    -- the imported file, whose rows are replaced together
    added_at REAL NOT NULL        -- Unix seconds
);
CREATE INDEX IF NOT EXISTS example_added_at ON example (added_at);
"""


class Example(Struct, frozen=True):
    """One text, or pair of texts, to learn from."""

    text: str
    label: Label | None = None  #: name or index of its label; None for language modelling
    source: str = ""  #: where it came from, for error messages
    text_pair: str | None = None  #: the second text, where the task is about two

    @property
    def words(self) -> Text:
        """What the tokenizer reads."""
        return self.text if self.text_pair is None else (self.text, self.text_pair)


class Examples(Protocol):
    """What training needs of a store."""

    def count(self) -> int: ...

    def read(self) -> Sequence[Example]:
        """All examples in a stable order; called from a training thread."""
        ...


@dataclass(frozen=True)
class Shard:
    """Examples that are simply there, in memory: of an emulated device, or of an app that keeps its own."""

    examples: Sequence[Example]

    def count(self) -> int:
        return len(self.examples)

    def read(self) -> Sequence[Example]:
        return self.examples


@dataclass(frozen=True, kw_only=True)
class ExampleLimits:
    """What is kept; the oldest go first."""

    max_examples: int = 10_000
    max_text_bytes: int = 16 * 1024  #: of one text in UTF-8; longer ones are refused
    max_age_s: float | None = None  #: none is used past it, and a week later it is deleted; None for any age

    def __post_init__(self) -> None:
        for name in ("max_examples", "max_text_bytes", "max_age_s"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ConfigError(f"examples.{name}", value, "a number above 0")


class ExampleStore:
    """Examples in one SQLite file (WAL), readable by its owner alone; `path` None keeps them in memory.

    Safe to use from several threads and processes. Deleted texts are overwritten on disk.
    """

    def __init__(
        self, path: Path | None, limits: ExampleLimits | None = None, clock: Clock | None = None
    ) -> None:
        self._where, self._limits, self._clock = path, limits or ExampleLimits(), clock or SystemClock()
        self._guard = threading.RLock()
        with self._errors():
            if path is not None:
                path.touch(mode=0o600)
            self._db = self._connect()
            self._db.execute("PRAGMA journal_mode = WAL")
            self._db.execute("PRAGMA secure_delete = ON")
            self._db.executescript(_SCHEMA)
            if "text_pair" not in {row[1] for row in self._db.execute("PRAGMA table_info(example)")}:
                self._db.execute("ALTER TABLE example ADD COLUMN text_pair TEXT")  # of an earlier release
            self._reader, self._reading = self._db, self._guard
            if path is not None:  # whoever adds does not wait for whoever reads
                self._reader, self._reading = self._connect(), threading.RLock()
                self._reader.execute("PRAGMA cache_size = -256")  # KiB: reading all needs each page once

    def add(self, text: str, label: Label | None = None, *, text_pair: str | None = None) -> None:
        """Keep one example. Raises DataError where it has no text or too much.

        It returns when the example is on disk, after any other writer: an app with an event loop calls it
        beside that, `await asyncio.to_thread(store.add, text, label)`.
        """
        self._insert([Example(text, label, text_pair=text_pair)], file=None)

    def replace_file(self, file: str, examples: Iterable[Example]) -> int:
        """Keep the rows of a file in place of those kept from it before; returns how many.

        All or nothing: an error in any row leaves the store as it was.
        """
        return self._insert(list(examples), file=file)

    def count(self) -> int:
        with self._reading, self._errors():
            where, values = self._young()
            (found,) = self._reader.execute(f"SELECT count(*) FROM example {where}", values).fetchone()  # noqa: S608  # constants
            return int(found)

    def read(self) -> list[Example]:
        with self._reading, self._errors():
            where, values = self._young()
            query = f"SELECT text, label, source, text_pair FROM example {where} ORDER BY id"  # noqa: S608  # constants
            return [Example(*row) for row in self._reader.execute(query, values)]

    def clear(self) -> None:
        """Delete every example."""
        with self._transaction() as db:
            db.execute("DELETE FROM example")
        with self._reading, self._guard, self._errors():  # a reader would keep the log from being cut
            self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")

    def close(self) -> None:
        with self._reading, self._guard:
            self._reader.close()
            self._db.close()

    def _connect(self) -> sqlite3.Connection:
        where = self._where or ":memory:"
        return sqlite3.connect(where, timeout=10, isolation_level=None, check_same_thread=False)

    def _insert(self, examples: Sequence[Example], file: str | None) -> int:
        for example in examples:
            self._check(example)
        file = None if file is None else _printable(file)
        now = self._clock.now()
        rows = [(e.text, e.text_pair, e.label, _printable(e.source), file, now) for e in examples]
        with self._transaction() as db:
            if file is not None:
                db.execute("DELETE FROM example WHERE file = ?", (file,))
            db.executemany(
                "INSERT INTO example (text, text_pair, label, source, file, added_at)"
                " VALUES (?, ?, ?, ?, ?, ?)",
                rows,
            )
            db.execute(
                "DELETE FROM example WHERE id <= (SELECT id FROM example ORDER BY id DESC LIMIT 1 OFFSET ?)",
                (self._limits.max_examples,),
            )
            if self._limits.max_age_s is not None:
                oldest = now - self._limits.max_age_s - _CLOCK_ERROR_S
                db.execute("DELETE FROM example WHERE added_at < ?", (oldest,))
        return len(rows)

    def _check(self, example: Example) -> None:
        where = f"{example.source}: " if example.source else ""
        texts = [example.text] if example.text_pair is None else [example.text, example.text_pair]
        if not all(text.strip() for text in texts):
            raise DataError(f"{where}an example needs a text that is not empty")
        if isinstance(example.label, int) and abs(example.label) > _LARGEST:
            raise DataError(f"{where}the label is a number of more than 63 bits")
        try:
            size = len("".join(texts).encode())
            str(example.label).encode()
        except UnicodeEncodeError:
            raise DataError(f"{where}a text or label holds half a character: it is no Unicode") from None
        if size > self._limits.max_text_bytes:
            raise DataError(
                f"{where}the text has {size} bytes, at most {self._limits.max_text_bytes} are kept"
            )

    def _young(self) -> tuple[str, tuple[float, ...]]:
        if self._limits.max_age_s is None:
            return "", ()
        return "WHERE added_at >= ?", (self._clock.now() - self._limits.max_age_s,)

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._guard, self._errors():
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield self._db
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:  # a full disk has ended it
                    self._db.execute("ROLLBACK")
                raise

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            with storage_errors(self._where or Path("the example store")):
                yield
        except sqlite3.Error as error:
            kind = DiskFullError if getattr(error, "sqlite_errorcode", 0) in _FULL else StorageError
            raise kind(
                f"{self._where or 'the example store'} cannot be used ({error}): "
                "check the directory, its rights and the space on its disk"
            ) from None


def is_store(path: Path) -> bool:
    """Whether a file is a store of examples, be it damaged or locked, rather than another program's or none.

    Raises StorageError where the file may not be read.
    """
    if not path.is_file():
        return False
    try:
        with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)) as db:
            columns = {row[1] for row in db.execute("PRAGMA table_info(example)")}
    except sqlite3.Error:  # what lies at this name and cannot be looked into is taken for texts of the owner
        with storage_errors(path), path.open("rb") as file:
            return file.read(len(_MAGIC)) == _MAGIC
    return columns >= {"text", "label", "source", "file", "added_at"}


def _printable(name: str) -> str:
    """A name of a file as it may be stored: one that is not UTF-8 shows its bytes."""
    return name.encode(errors="backslashreplace").decode()


def label_index(example: Example, labels: Sequence[str]) -> int:
    """The index of an example's label: a name of the task's labels, or an index into them.

    Digits that are no name count as an index, since CSV knows only text. Raises DataError.
    """
    where = f"{example.source}: " if example.source else ""
    match example.label:
        case None:
            raise DataError(f"{where}the example has no label, and the task is to tell labels apart")
        case str(name) if name in labels:
            return labels.index(name)
        case str(name) if not name.isdecimal() or len(name) > _INDEX_DIGITS:
            known = ", ".join(labels[:5]) + (", …" if len(labels) > 5 else "")
            raise DataError(
                f"{where}label {name[:50]!r} is not among the task's {len(labels)} labels: {known}"
            )
        case number:
            index = int(number)
    if not 0 <= index < len(labels):
        shown = index if abs(index) <= _LARGEST else "of more than 63 bits"
        raise DataError(
            f"{where}label index {shown} is out of range: the task has labels 0..{len(labels) - 1}"
        )
    return index
