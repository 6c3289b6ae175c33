"""An object store that takes connections and says nothing: downloads wait for it, and nothing else does."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest
from obstore.store import S3Store

from fedtt.messages import Code, Wait, Work
from storage.object_blobs import ObjectBlobs
from tests.support.served import CHECK_IN, frame_of, refused, served, task_text

STALLS_S = 3.0  #: until the store's client gives a request up
DOWNLOADS = 40


@pytest.fixture
def silent() -> Iterator[S3Store]:
    with socket.create_server(("127.0.0.1", 0), backlog=1000) as listener:
        yield S3Store(
            "bucket",
            config={
                "endpoint": f"http://127.0.0.1:{listener.getsockname()[1]}",
                "access_key_id": "a",
                "secret_access_key": "b",
                "region": "x",
            },
            client_options={"allow_http": True, "timeout": f"{STALLS_S:g}s"},
            retry_config={"max_retries": 0, "retry_timeout": timedelta(seconds=1)},
        )


async def test_devices_are_served_while_downloads_wait(tmp_path: Path, silent: S3Store) -> None:
    async with served(tmp_path, task_text(), blobs="memory:///") as server, server.device() as device:
        work = await device.work()
        blobs = server.service.blobs
        assert isinstance(blobs, ObjectBlobs)
        blobs._store = silent
        path = f"/v1/versions/{work.plan.version}"
        downloads = [asyncio.create_task(device.request("GET", path)) for _ in range(DOWNLOADS)]
        await asyncio.sleep(0.5)
        async with asyncio.timeout(STALLS_S / 2):
            assert (await server.raw("GET", "/readyz")).status == 200
            async with server.device() as other:
                assert isinstance(await other.transport.check_in(CHECK_IN), Work | Wait)
            await device.transport.upload(work.lease, frame_of(work.plan))
        assert not any(download.done() for download in downloads)
        refused(await downloads[0], Code.BUSY)
        for download in downloads[1:]:
            download.cancel()
        await asyncio.gather(*downloads[1:], return_exceptions=True)
