"""Files that devices download, from a directory and from object storage: whole and in parts."""

from __future__ import annotations

import hashlib
import threading
import tracemalloc
from collections import Counter
from collections.abc import AsyncIterator, Callable
from typing import Any

import aiohttp
import obstore
import pytest
import pytest_asyncio
from yarl import URL

from aggregator.metrics import totals
from fedtt.manifest import MANIFEST, bundle_digest
from fedtt.messages import Code, Problem, decode
from storage.object_blobs import ObjectBlobs
from tests.support.edge import write_small_bundle
from tests.support.served import Peer, Served, refused, served, task_text, until

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module", params=["files", "objects"])
async def server(request: Any, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Served]:
    blobs = "memory:///" if request.param == "objects" else None
    async with served(tmp_path_factory.mktemp("server"), task_text(), blobs=blobs) as running:
        yield running


async def paths_of(server: Served, device: Peer) -> dict[str, int]:
    """What may be downloaded -> its length."""
    version = (await device.work()).plan.version
    bundle = bundle_digest((server.bundle / MANIFEST).read_bytes())
    sizes = {version: server.service.blobs.size(version)}
    return {f"/v1/versions/{version}": sizes[version], f"/v1/bundles/{bundle}/base.bin": 1000}


RANGES = {
    None: (200, slice(None)),
    "bytes=0-": (206, slice(None)),
    "bytes=5-": (206, slice(5, None)),
    "bytes=1-3": (206, slice(1, 4)),
    "bytes=-5": (206, slice(-5, None)),
    "bytes=2-999999999999": (206, slice(2, None)),
    "bytes=999999999999-": (416, slice(0)),
    "bytes=5-2": (416, slice(0)),
    "bytes=1-2,4-5": (416, slice(0)),
    "garbage": (416, slice(0)),
    "bytes=" + "9" * 4000 + "-": (416, slice(0)),
}


async def test_what_a_range_asks_is_what_comes(server: Served) -> None:
    async with server.device() as device:
        for path, size in (await paths_of(server, device)).items():
            whole = await server.raw("GET", path, None, device.signed("GET", path))
            assert len(whole.body) == size
            for said, (status, part) in RANGES.items():
                headers = device.signed("GET", path) | ({} if said is None else {"Range": said})
                answer = await server.raw("GET", path, None, headers)
                assert answer.status == status, said
                if status == 416:
                    assert f"of a file of {size} bytes" in decode(answer.body, Problem).detail
                else:
                    assert answer.body == whole.body[part], said
                if status != 200:
                    start, stop, _ = part.indices(size)
                    wanted = f"bytes {start}-{stop - 1}/{size}" if status == 206 else f"bytes */{size}"
                    assert answer.headers["Content-Range"] == wanted


async def test_what_asks_the_blob_store_is_beside_the_loop(
    server: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    blobs, asked = type(server.service.blobs), list[int]()

    def watched(plain: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            asked.append(threading.get_ident())
            return plain(*args)

        return call

    for name in ("has", "size"):
        monkeypatch.setattr(blobs, name, watched(getattr(blobs, name)))
    assert (await server.people("HEAD", f"/blobs/{'0' * 64}")).status == 404
    assert (await server.people("POST", "/bundles", (server.bundle / MANIFEST).read_bytes())).status == 201
    assert len(asked) >= 3
    assert threading.get_ident() not in asked


# from object storage: read once, sound at its end

LONG_BYTES = 16 << 20


class Watched:
    """A reader of the real store that counts."""

    def __init__(self, file: Any, counts: Counter[str]) -> None:
        self._file, self._counts = file, counts

    def read(self, size: int) -> Any:
        data = self._file.read(size)
        self._counts["bytes"] += len(data)
        return data

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """What is asked of object storage: `opened` and `head` calls, `bytes` read."""
    found, opened, head = Counter[str](), obstore.open_reader, obstore.head

    def open_reader(*args: Any) -> Watched:
        found["opened"] += 1
        return Watched(opened(*args), found)

    def watched_head(*args: Any) -> Any:
        found["head"] += 1
        return head(*args)

    monkeypatch.setattr(obstore, "open_reader", open_reader)
    monkeypatch.setattr(obstore, "head", watched_head)
    return found


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def objects(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Served]:
    """A server on object storage with a bundle whose base is long."""
    place = tmp_path_factory.mktemp("objects")
    async with served(place / "server", task_text(), blobs="memory:///") as server:
        write_small_bundle(place / "long", base_bytes=LONG_BYTES)
        await server.admin.send_bundle(place / "long")
        server.bundle = place / "long"
        yield server


def base_of(server: Served) -> tuple[str, str]:
    """(where devices get the long file, its sha256)."""
    bundle = bundle_digest((server.bundle / MANIFEST).read_bytes())
    name = hashlib.sha256((server.bundle / "base.bin").read_bytes()).hexdigest()
    return f"/v1/bundles/{bundle}/base.bin", name


async def test_a_whole_version_is_read_once(objects: Served, counts: Counter[str]) -> None:
    async with objects.device() as device:
        version = (await device.work()).plan.version
        counts.clear()
        whole = await device.request("GET", f"/v1/versions/{version}")
        assert hashlib.sha256(whole.body).hexdigest() == version
        assert counts == {"opened": 1, "bytes": len(whole.body)}


async def test_a_long_file_is_read_once_and_never_held(objects: Served, counts: Counter[str]) -> None:
    path, name = base_of(objects)
    async with objects.device() as device, aiohttp.ClientSession() as web:
        headers, digest = device.signed("GET", path), hashlib.sha256()
        tracemalloc.start()
        try:
            async with web.get(URL(objects.url + path), headers=headers) as answer:
                async for piece in answer.content.iter_chunked(1 << 16):
                    digest.update(piece)
            _, peak_bytes = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert digest.hexdigest() == name
        assert counts == {"opened": 1, "bytes": LONG_BYTES}
        assert peak_bytes < LONG_BYTES / 4


async def test_head_brings_the_length_alone(objects: Served, counts: Counter[str]) -> None:
    path, _ = base_of(objects)
    async with objects.device() as device, aiohttp.ClientSession() as web:
        for _ in range(2):  # on one connection: a body behind the first would spoil the second
            async with web.head(URL(objects.url + path), headers=device.signed("HEAD", path)) as answer:
                assert (answer.status, answer.content_length) == (200, LONG_BYTES)
        assert counts["bytes"] == 0


async def test_what_is_damaged_is_refused_where_it_is_short_and_never_comes_whole_where_it_is_long(
    objects: Served, caplog: pytest.LogCaptureFixture
) -> None:
    path, name = base_of(objects)
    blobs = objects.service.blobs
    assert isinstance(blobs, ObjectBlobs)
    async with objects.device() as device:
        version = (await device.work()).plan.version
        for sha256, ask in ((version, f"/v1/versions/{version}"), (name, path)):
            key = f"{sha256[:2]}/{sha256}"
            kept = bytes(obstore.get(blobs._store, key).bytes())
            obstore.put(blobs._store, key, kept[:-1] + bytes([kept[-1] ^ 1]))
            try:
                if sha256 == version:
                    refused(await device.request("GET", ask), Code.BUSY)
                else:
                    with pytest.raises(aiohttp.ClientPayloadError):
                        await device.request("GET", ask)
            finally:
                obstore.put(blobs._store, key, kept)
            assert f"blob {sha256[:12]}… is damaged where it is stored" in caplog.text
        assert hashlib.sha256((await device.request("GET", path)).body).hexdigest() == name


async def test_a_device_that_goes_away_in_the_middle_is_no_fault_of_the_server(
    objects: Served, caplog: pytest.LogCaptureFixture
) -> None:
    path, _ = base_of(objects)
    requests = objects.service.metrics.requests
    async with objects.device() as device:
        before = totals(requests, "route").get("/v1/bundles/{sha256}/{file}", 0)
        reader, writer = await objects.connect()
        head = "".join(f"{key}: {value}\r\n" for key, value in device.signed("GET", path).items())
        authority = URL(objects.url).host_port_subcomponent
        writer.write(f"GET {path} HTTP/1.1\r\nHost: {authority}\r\n{head}\r\n".encode())
        assert (await reader.readline()).startswith(b"HTTP/1.1 200 ")
        writer.transport.abort()

        async def is_over() -> bool:
            return totals(requests, "route").get("/v1/bundles/{sha256}/{file}", 0) == before + 1

        await until(is_over)
    assert totals(objects.service.metrics.refusals, "code")["internal"] == 0
    assert "failed" not in caplog.text
