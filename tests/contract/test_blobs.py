"""What every blob store promises, in one class; each store inherits it whole."""

from __future__ import annotations

import hashlib
import shutil
import socket
import subprocess
import time
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import pytest
from obstore.store import LocalStore as ObjectsInFiles
from obstore.store import MemoryStore as ObjectsInMemory
from obstore.store import S3Store

from fedtt.errors import ConfigError, StorageError, UnavailableError, WireError
from storage.blobs import BlobStore, FileBlobs, MemoryBlobs, check, open_blobs, save
from storage.object_blobs import ObjectBlobs

CONTENT = bytes(range(256)) * 20  # 256·20 = 5120 bytes
NAME = hashlib.sha256(CONTENT).hexdigest()
NOBODY_THERE: dict[str, Any] = {
    "config": {
        "endpoint": "http://127.0.0.1:9",
        "access_key_id": "a",
        "secret_access_key": "b",
        "region": "x",
    },
    "client_options": {"allow_http": True, "timeout": "1s"},
    "retry_config": {"max_retries": 0, "retry_timeout": timedelta(seconds=1)},
}
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


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    """The address of moto's S3 server with a bucket `blobs`."""
    program = shutil.which("moto_server")
    if program is None:
        pytest.skip(
            "NOT TESTED OVER S3: no moto_server on the path (pip install 'moto[server]', in any place)"
        )
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    server = subprocess.Popen(
        [program, "-p", str(port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        for _ in range(200):
            with suppress(OSError), urlopen(Request(f"{url}/blobs", method="PUT"), timeout=5):  # noqa: S310
                break
            time.sleep(0.1)
        yield url
    finally:
        server.terminate()
        server.wait()


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

    def test_a_sound_blob_of_many_pieces_is_found_so_and_a_missing_one_is_not(self, blobs: BlobStore) -> None:
        check(blobs, save(blobs, bytes(range(256)) * 4000))  # 1 MB
        with pytest.raises(StorageError):
            check(blobs, NAME)

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


class TestObjectBlobs(BlobContract):
    @pytest.fixture
    def blobs(self) -> BlobStore:
        return ObjectBlobs(ObjectsInMemory(), "memory")


class TestObjectBlobsOverS3(BlobContract):
    """Every byte through S3's own protocol, signed, to a server of its own."""

    @pytest.fixture
    def blobs(self, s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> BlobStore:
        settings = {"ENDPOINT_URL": s3, "ALLOW_HTTP": "true", "REGION": "us-east-1"}
        for name, value in {**settings, "ACCESS_KEY_ID": "a", "SECRET_ACCESS_KEY": "b"}.items():
            monkeypatch.setenv(f"AWS_{name}", value)
        return open_blobs(f"s3://blobs/{tmp_path.name}")  # a prefix of its own


class TestObjectBlobsInADirectory(BlobContract):
    @pytest.fixture
    def blobs(self, tmp_path: Path) -> BlobStore:
        return ObjectBlobs(ObjectsInFiles(tmp_path), str(tmp_path))


def test_what_is_no_store_is_named() -> None:
    with pytest.raises(
        ConfigError, match=r"--blobs = 'ftp://host/blobs' is not allowed: a directory or s3://"
    ):
        open_blobs("ftp://host/blobs")


def test_a_store_that_does_not_answer_is_unavailable_not_empty() -> None:
    blobs = ObjectBlobs(S3Store("bucket", **NOBODY_THERE), "s3://bucket")
    for ask in (blobs.has, blobs.size, blobs.open, blobs.delete):
        with pytest.raises(UnavailableError, match=r"s3://bucket: the object store failed"):
            ask(NAME)
    with pytest.raises(UnavailableError):
        blobs.put(NAME, [CONTENT], limit_bytes=5120)
