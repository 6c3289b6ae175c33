"""Files that devices download, from a directory and from object storage: whole and in parts."""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
import pytest_asyncio

from fedtt.manifest import MANIFEST, bundle_digest
from tests.support.served import Peer, Served, served, task_text

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
                assert (answer.status, answer.body) == (status, whole.body[part]), said
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
