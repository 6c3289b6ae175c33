"""Files that appear under their names whole or not at all: written beside, checked, renamed."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

from fedtt.errors import FedttError
from fedtt.manifest import FileEntry

__all__ = ["Arriving", "is_there", "write_whole"]


class Arriving:
    """A file on its way: NAME.part until `keep`; gone where the block ends without."""

    def __init__(self, target: Path, entry: FileEntry) -> None:
        self._target, self._entry = target, entry
        self._part = target.with_name(target.name + ".part")
        self._hash, self._bytes = hashlib.sha256(), 0

    def __enter__(self) -> Self:
        with _errors_in_words(self._target.parent):
            self._target.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._part.open("wb")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with _errors_in_words(self._target.parent):
            self._file.close()
            self._part.unlink(missing_ok=True)

    def write(self, piece: bytes) -> None:
        """Append; raises FedttError where more comes than the file has."""
        self._bytes += len(piece)
        if self._bytes > self._entry.bytes:
            raise FedttError(f"{self._target.name} is longer than its {self._entry.bytes} bytes: {_AGAIN}")
        self._hash.update(piece)
        with _errors_in_words(self._target.parent):
            self._file.write(piece)

    def keep(self) -> None:
        """Give the file its name; raises FedttError where it is not what was asked for."""
        if (self._bytes, self._hash.hexdigest()) != (self._entry.bytes, self._entry.sha256):
            raise FedttError(f"{self._target.name} came damaged, {self._bytes} bytes of it: {_AGAIN}")
        with _errors_in_words(self._target.parent):
            self._file.close()
            self._part.replace(self._target)


_AGAIN = "download it again"


def write_whole(target: Path, data: bytes) -> None:
    with Arriving(target, FileEntry(hashlib.sha256(data).hexdigest(), len(data))) as arriving:
        arriving.write(data)
        arriving.keep()


def is_there(path: Path, entry: FileEntry) -> bool:
    """Whether the file lies there already, whole."""
    with _errors_in_words(path.parent):
        if not path.is_file() or path.stat().st_size != entry.bytes:
            return False
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest() == entry.sha256


@contextmanager
def _errors_in_words(directory: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise FedttError(f"{directory} cannot be written: {error.strerror}") from None
