"""What every blob store promises, in one class; each store inherits it whole."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator, Iterable
from pathlib import Path

import pytest

from fedtt.errors import StorageError, WireError
from storage.blobs import BlobStore, FileBlobs, MemoryBlobs

CONTENT = bytes(range(256)) * 20  # 256·20 = 5120 bytes
NAME = hashlib.sha256(CONTENT).hexdigest()
HOSTILE = [
    "",
    "..",
    "../" + NAME,
    NAME[:-1],
    NAME + "\n",
    NAME.upper(),
    NAME[:-1] + "/",
    "\0" * 64,
    "/" + NAME,
]


def in_pieces(content: bytes, size: int = 1000) -> Iterable[bytes]:
    return [content[start : start + size] for start in range(0, len(content), size)]


async def arriving(pieces: Iterable[bytes], breaks: Exception | None = None) -> AsyncIterator[bytes]:
    for piece in pieces:
        yield piece
    if breaks:
        raise breaks


class BlobContract:
    """Tests of `storage.blobs.BlobStore`; a subclass makes the store."""

    @pytest.fixture
    def blobs(self, tmp_path: Path) -> BlobStore:
        raise NotImplementedError

    def test_a_blob_that_was_put_is_read_from_any_place(self, blobs: BlobStore) -> None:
        assert blobs.put(NAME, in_pieces(CONTENT), limit_bytes=len(CONTENT)) == 5120
        assert blobs.has(NAME)
        assert blobs.size(NAME) == 5120
        with blobs.open(NAME) as stream:
            assert stream.read() == CONTENT
            stream.seek(5000)
            assert stream.read(10) == CONTENT[5000:5010]

    async def test_a_blob_that_was_received_is_the_same(self, blobs: BlobStore) -> None:
        assert await blobs.receive(NAME, arriving(in_pieces(CONTENT)), limit_bytes=5120) == 5120
        with blobs.open(NAME) as stream:
            assert stream.read() == CONTENT

    def test_the_empty_blob_is_a_blob(self, blobs: BlobStore) -> None:
        name = hashlib.sha256().hexdigest()
        assert blobs.put(name, [], limit_bytes=0) == 0
        assert blobs.size(name) == 0

    def test_putting_a_blob_again_is_harmless(self, blobs: BlobStore) -> None:
        for _ in range(2):
            assert blobs.put(NAME, [CONTENT], limit_bytes=5120) == 5120
        assert blobs.size(NAME) == 5120

    def test_bytes_of_another_hash_are_refused_and_not_kept(self, blobs: BlobStore) -> None:
        with pytest.raises(WireError, match=f"blob {NAME[:12]}… came with sha256"):
            blobs.put(NAME, [CONTENT, b"!"], limit_bytes=6000)
        assert not blobs.has(NAME)

    async def test_too_many_bytes_are_refused_and_not_kept(self, blobs: BlobStore) -> None:
        with pytest.raises(WireError, match="longer than the 5119 bytes allowed"):
            blobs.put(NAME, in_pieces(CONTENT), limit_bytes=5119)
        with pytest.raises(WireError, match="longer than the 5119 bytes allowed"):
            await blobs.receive(NAME, arriving(in_pieces(CONTENT)), limit_bytes=5119)
        assert not blobs.has(NAME)

    async def test_a_connection_that_breaks_is_no_fault_of_the_store(self, blobs: BlobStore) -> None:
        lost = ConnectionResetError("peer is gone")
        with pytest.raises(ConnectionResetError, match="peer is gone"):
            await blobs.receive(NAME, arriving(in_pieces(CONTENT), lost), limit_bytes=5120)
        assert not blobs.has(NAME)

    def test_a_failed_attempt_leaves_an_earlier_blob_as_it_was(self, blobs: BlobStore) -> None:
        blobs.put(NAME, [CONTENT], limit_bytes=5120)
        with pytest.raises(WireError):
            blobs.put(NAME, [b"other"], limit_bytes=5120)
        with blobs.open(NAME) as stream:
            assert stream.read() == CONTENT

    def test_a_deleted_blob_is_gone(self, blobs: BlobStore) -> None:
        blobs.put(NAME, [CONTENT], limit_bytes=5120)
        assert blobs.delete(NAME)
        assert not blobs.delete(NAME)
        assert not blobs.has(NAME)

    def test_a_blob_that_is_not_there_is_named(self, blobs: BlobStore) -> None:
        assert not blobs.has(NAME)
        for look in (blobs.open, blobs.size):
            with pytest.raises(StorageError, match=f"there is no blob {NAME}"):
                look(NAME)

    @pytest.mark.parametrize("name", HOSTILE)
    def test_a_name_that_is_no_hash_never_reaches_the_disk(self, name: str, blobs: BlobStore) -> None:
        for touch in (blobs.open, blobs.size, blobs.has, blobs.delete):
            with pytest.raises(WireError, match="does not name a blob"):
                touch(name)
        with pytest.raises(WireError, match="does not name a blob"):
            blobs.put(name, [CONTENT], limit_bytes=5120)


class TestMemoryBlobs(BlobContract):
    @pytest.fixture
    def blobs(self) -> BlobStore:
        return MemoryBlobs()


class TestFileBlobs(BlobContract):
    @pytest.fixture
    def blobs(self, tmp_path: Path) -> BlobStore:
        return FileBlobs(tmp_path / "blobs")
