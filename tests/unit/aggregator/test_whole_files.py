"""A file under its own name is whole; what is left of a broken one is nothing."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from aggregator.whole_files import Arriving, is_there, write_whole
from fedtt.errors import FedttError
from fedtt.manifest import FileEntry

CONTENT = b"0123456789"
ENTRY = FileEntry(hashlib.sha256(CONTENT).hexdigest(), len(CONTENT))


def arrive(target: Path, *pieces: bytes) -> None:
    with Arriving(target, ENTRY) as arriving:
        for piece in pieces:
            arriving.write(piece)
            assert not target.exists()
        arriving.keep()


def test_a_file_takes_its_name_when_it_is_whole(tmp_path: Path) -> None:
    arrive(tmp_path / "new" / "a", CONTENT[:3], CONTENT[3:])
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["a"]
    assert (tmp_path / "new" / "a").read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("pieces", "said"),
    [
        ((CONTENT[:9],), "a came damaged, 9 bytes of it: download it again"),
        ((CONTENT[:9], b"x"), "a came damaged, 10 bytes of it: download it again"),
        ((CONTENT, b"x"), "a is longer than its 10 bytes: download it again"),
    ],
)
def test_a_file_that_came_broken_leaves_nothing(pieces: tuple[bytes, ...], said: str, tmp_path: Path) -> None:
    with pytest.raises(FedttError, match=said):
        arrive(tmp_path / "a", *pieces)
    assert list(tmp_path.iterdir()) == []


def test_a_file_written_again_is_replaced_at_once_or_kept(tmp_path: Path) -> None:
    write_whole(tmp_path / "a", b"old")
    with Arriving(tmp_path / "a", ENTRY) as arriving:
        arriving.write(CONTENT[:5])
    assert (tmp_path / "a").read_bytes() == b"old"
    write_whole(tmp_path / "a", CONTENT)
    assert (tmp_path / "a").read_bytes() == CONTENT


def test_a_file_is_there_when_size_and_content_match(tmp_path: Path) -> None:
    path = tmp_path / "a"
    assert not is_there(path, ENTRY)
    for found, whole in ((CONTENT, True), (CONTENT[:9], False), (CONTENT[:9] + b"x", False)):
        path.write_bytes(found)
        assert is_there(path, ENTRY) == whole


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(FedttError, match=r"file/below cannot be written: Not a directory"):
        write_whole(tmp_path / "file" / "below" / "a", CONTENT)
