"""A device's way to the real server without sockets: the aggregator's own service, in this process."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TypeVar

import numpy as np
from aiohttp import web

from aggregator.auth import token_sha256
from aggregator.problems import not_found, unknown_device
from aggregator.service import Service
from fedtt.errors import Refused, WireError
from fedtt.manifest import MANIFEST, decode_manifest
from fedtt.messages import CheckIn, CheckInAnswer, Enroll, Enrolled, Failure, Problem, Receipt
from fedtt.seams import Clock
from fedtt.task import TaskSpec
from fedtt.wire import encode_theta
from storage.blobs import FileBlobs, load, save
from storage.memory import MemoryStore
from storage.records import DeviceState, Token
from tests.support.tiny import add_task

__all__ = ["TOKEN", "InProcess", "listening", "memory_service"]

T = TypeVar("T")
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


class InProcess:
    """A Transport to a service; the server does what is due after each update."""

    def __init__(self, service: Service, device: str) -> None:
        self._service, self._device = service, device

    async def enroll(self, message: Enroll) -> Enrolled:
        return _checked(await self._service.enroll(message))

    async def check_in(self, message: CheckIn) -> CheckInAnswer:
        answer = await self._service.check_in(await self._known(), message)
        if isinstance(answer, Problem):
            raise Refused(answer)
        return answer

    async def bundle_file(self, bundle: str, name: str, offset: int) -> AsyncGenerator[bytes, None]:
        await self._known()
        found = await self._service.read(lambda tx: tx.bundle(bundle))
        files = decode_manifest(found.manifest).files if found else {}
        if found and name == MANIFEST:
            data = found.manifest
        elif name in files:
            data = load(self._service.blobs, files[name].sha256)
        else:
            raise Refused(not_found(f"file {name!r} in bundle {bundle[:12]}…"))
        for start in range(offset, len(data), 100_000):
            yield data[start : start + 100_000]

    async def version(self, sha256: str, limit_bytes: int) -> bytes:
        await self._known()
        data = _checked(await self._service.version(sha256))
        if len(data) > limit_bytes:
            raise WireError(f"a version of {len(data)} bytes came, at most {limit_bytes} are read")
        return data

    async def upload(self, lease: str, frame: bytes) -> Receipt:
        digest = hashlib.sha256(frame).hexdigest()
        admitted = await self._service.admit(await self._known(), lease, digest)
        if not isinstance(admitted, tuple):
            return _checked(admitted)
        receipt = _checked(await self._service.upload(admitted[0], frame))
        await self._service.tick()
        return receipt

    async def receipt(self, lease: str) -> Receipt:
        return _checked(await self._service.receipt(await self._known(), lease))

    async def fail(self, lease: str, failure: Failure) -> None:
        _checked(await self._service.fail(await self._known(), lease, failure))

    async def leave(self, *, erase: bool) -> None:
        _checked(await self._service.leave(await self._known(), erase=erase))

    async def close(self) -> None:
        pass

    async def _known(self) -> str:
        """The device's name, refused where no signature of it would be taken."""
        device = await self._service.device(self._device)
        if device is None or device.state is DeviceState.ERASED:
            raise Refused(unknown_device())
        return self._device


def _checked(answer: T | Problem) -> T:
    if isinstance(answer, Problem):
        raise Refused(answer)
    return answer
