"""A device's way to the real server without sockets: the aggregator's own service, in this process."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from typing import TypeVar

from aggregator.problems import not_found, unknown_device
from aggregator.service import Service
from fedtt.errors import Refused, WireError
from fedtt.manifest import MANIFEST, decode_manifest
from fedtt.messages import (
    AsTold,
    CheckIn,
    CheckInAnswer,
    Enroll,
    Enrolled,
    Failure,
    Problem,
    Receipt,
    Verdict,
)
from fedtt.seams import VersionBody
from storage.blobs import load
from storage.records import DeviceState

__all__ = ["InProcess", "Shelf"]

T = TypeVar("T")
Shelf = dict[tuple[str, str | None], VersionBody]
_SHELVED = 64  #: versions and differences


class InProcess:
    """A Transport of one device to a service.

    settle: called after each update; None has the server do what is due at once.
    shelf: versions as the service gave them, kept for all devices that share it; None keeps none.
    """

    def __init__(
        self,
        service: Service,
        device: str,
        *,
        settle: Callable[[], None] | None = None,
        shelf: Shelf | None = None,
    ) -> None:
        self._service, self._device = service, device
        self._settle, self._shelf = settle, shelf

    async def enroll(self, message: Enroll) -> Enrolled:
        return _checked(await self._service.enroll(message))

    async def check_in(self, message: CheckIn | AsTold) -> CheckInAnswer:
        answer = await self._service.check_in(self._device, message)
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

    async def version(self, sha256: str, limit_bytes: int, held: str | None = None) -> VersionBody:
        body = None if self._shelf is None else self._shelf.get((sha256, held))
        if body is None:
            await self._known()
            body = _checked(await self._service.version(sha256, held))
            self._keep((sha256, held), body)
        if len(body.data) > limit_bytes:
            raise WireError(f"a version of {len(body.data)} bytes came, at most {limit_bytes} are read")
        return body

    async def upload(self, lease: str, frame: bytes) -> Receipt:
        receipt = _checked(await self._service.take(self._device, lease, frame))
        await self._due()
        return receipt

    async def receipt(self, lease: str) -> Receipt:
        return _checked(await self._service.receipt(await self._known(), lease))

    async def judge(self, lease: str, verdict: Verdict) -> None:
        _checked(await self._service.judge(await self._known(), lease, verdict))
        await self._due()

    async def fail(self, lease: str, failure: Failure) -> None:
        _checked(await self._service.fail(await self._known(), lease, failure))

    async def leave(self, *, erase: bool) -> None:
        _checked(await self._service.leave(await self._known(), erase=erase))

    async def close(self) -> None:
        pass

    async def _due(self) -> None:
        if self._settle is None:
            await self._service.tick()
        else:
            self._settle()

    def _keep(self, key: tuple[str, str | None], body: VersionBody) -> None:
        if self._shelf is not None:
            while len(self._shelf) >= _SHELVED:
                del self._shelf[next(iter(self._shelf))]
            self._shelf[key] = body

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
