"""The real server without its process: its service on a memory store, or its application on a free port."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import numpy as np
from aiohttp import web

from aggregator.service import Service
from aggregator.token_files import token_sha256
from fedtt.manifest import MANIFEST, decode_manifest
from fedtt.seams import Clock
from fedtt.task import TaskSpec
from fedtt.wire import encode_theta
from fleet.in_process import InProcess
from storage.blobs import FileBlobs, save
from storage.memory import MemoryStore
from storage.records import Token
from tests.support.tiny import add_task

__all__ = ["TOKEN", "InProcess", "listening", "memory_service"]

TOKEN = "an enrolment token"


@asynccontextmanager
async def memory_service(
    directory: Path, spec: TaskSpec, bundle: Path, clock: Clock
) -> AsyncIterator[Service]:
    """The aggregator's service on a memory store, with one task on a bundle and version 0 all zero."""
    service = Service(MemoryStore(), FileBlobs(directory), clock)
    data = (bundle / MANIFEST).read_bytes()
    manifest = decode_manifest(data)
    for name in manifest.files:
        save(service.blobs, (bundle / name).read_bytes())
    save(service.blobs, encode_theta(np.zeros(manifest.adapter.layout.size, np.float32)))
    with service.store.transaction() as tx:
        tx.put_token(Token(sha256=token_sha256(TOKEN), uses_left=None, expires_at=None))
        add_task(tx, spec, clock.now(), manifest)
    service.writer.start()
    try:
        yield service
    finally:
        await service.writer.stop()


@asynccontextmanager
async def listening(app: web.Application) -> AsyncIterator[str]:
    """Serve an application on a free port of this machine; yields its address."""
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()
