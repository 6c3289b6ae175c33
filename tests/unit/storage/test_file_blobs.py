"""Blobs on disk: where they lie, and that nothing half written stays or counts."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import AsyncIterator, Iterator
from io import FileIO
from pathlib import Path
from typing import Any

import pytest

from fedtt.errors import StorageError, WireError
from storage.blobs import FileBlobs, check, load, save

CONTENT = b"factors" * 1000
NAME = hashlib.sha256(CONTENT).hexdigest()


def _files(directory: Path) -> list[Path]:
    return [path.relative_to(directory) for path in directory.rglob("*") if path.is_file()]


def test_a_blob_lies_under_the_first_two_digits_of_its_name(tmp_path: Path) -> None:
    blobs = FileBlobs(tmp_path)
    blobs.put(NAME, [CONTENT], limit_bytes=10_000)
    assert _files(tmp_path) == [Path(NAME[:2]) / NAME]
    assert Path(blobs.path(NAME)).read_bytes() == CONTENT


def test_nothing_of_a_refused_blob_stays(tmp_path: Path) -> None:
    blobs = FileBlobs(tmp_path)
    with pytest.raises(WireError):
        blobs.put(NAME, [CONTENT, b"!"], limit_bytes=10_000)
    with pytest.raises(WireError):
        blobs.put(NAME, [CONTENT], limit_bytes=10)
    assert _files(tmp_path) == []


async def test_while_a_blob_arrives_it_does_not_count(tmp_path: Path) -> None:
    blobs = FileBlobs(tmp_path)
    seen = []

    async def arriving() -> AsyncIterator[bytes]:
        yield CONTENT[:500]
        seen.append((blobs.has(NAME), len(_files(tmp_path))))
        yield CONTENT[500:]

    await blobs.receive(NAME, arriving(), limit_bytes=10_000)
    assert seen == [(False, 1)]
    assert blobs.has(NAME)


async def test_a_blob_that_arrives_is_written_beside_the_event_loop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writers: set[threading.Thread] = set()

    class Watched(FileIO):
        def write(self, data: Any, /) -> int:
            writers.add(threading.current_thread())
            return super().write(data)

    monkeypatch.setattr("storage.blobs.FileIO", Watched)

    async def arriving() -> AsyncIterator[bytes]:
        yield CONTENT

    await FileBlobs(tmp_path).receive(NAME, arriving(), limit_bytes=10_000)
    assert len(writers) == 1
    assert threading.current_thread() not in writers


def test_what_a_crash_left_half_written_is_swept_out_at_the_next_start(tmp_path: Path) -> None:
    FileBlobs(tmp_path).put(NAME, [CONTENT], limit_bytes=10_000)
    (tmp_path / "incoming" / "half").write_bytes(CONTENT[:500])
    os.utime(tmp_path / "incoming" / "half", (0, 0))
    (tmp_path / "incoming" / "coming").write_bytes(CONTENT[:500])  # by another process, at this moment
    FileBlobs(tmp_path)
    assert sorted(_files(tmp_path)) == sorted([Path(NAME[:2]) / NAME, Path("incoming") / "coming"])


def test_two_writers_of_one_blob_do_not_mix(tmp_path: Path) -> None:
    blobs = FileBlobs(tmp_path)

    def interrupted() -> Iterator[bytes]:
        yield CONTENT[:500]
        blobs.put(NAME, [CONTENT], limit_bytes=10_000)
        yield CONTENT[500:]

    blobs.put(NAME, interrupted(), limit_bytes=10_000)
    assert Path(blobs.path(NAME)).read_bytes() == CONTENT
    assert _files(tmp_path) == [Path(NAME[:2]) / NAME]


def test_a_file_in_place_of_the_directory_is_named(tmp_path: Path) -> None:
    (tmp_path / "blobs").write_text("a file")
    with pytest.raises(StorageError, match=r"blobs: .*see that it exists, has room"):
        FileBlobs(tmp_path / "blobs")


def test_a_blob_whose_last_byte_has_changed_is_damaged(tmp_path: Path) -> None:
    blobs, content = FileBlobs(tmp_path), bytes(range(256)) * 4000  # 1 MB, of several pieces
    sha256 = save(blobs, content)
    Path(blobs.path(sha256)).write_bytes(content[:-1] + b"\0")
    for read in (check, load):
        with pytest.raises(StorageError, match="is damaged where it is stored: restore it from a backup"):
            read(blobs, sha256)
