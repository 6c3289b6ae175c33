"""A device's way to its server, as wide as its profile: every byte takes time and is counted."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable
from typing import TypeVar

from fedtt.messages import (
    AsTold,
    CheckIn,
    CheckInAnswer,
    Enroll,
    Enrolled,
    Failure,
    Message,
    Receipt,
    Verdict,
    encode,
)
from fedtt.seams import Clock, Transport, VersionBody
from fleet.profiles import Profile

__all__ = ["DeviceClock", "Link"]

M = TypeVar("M", bound=Message)


class DeviceClock:
    """A device's own Clock, which may be ahead of everybody's by what it still has to wait for.

    So a download costs no wait of its own: it is over when the device next waits, and its time has passed.
    """

    __slots__ = ("_ahead_s", "_clock")

    def __init__(self, clock: Clock) -> None:
        self._clock, self._ahead_s = clock, 0.0

    def now(self) -> float:
        return self._clock.now() + self._ahead_s

    def spend(self, seconds: float) -> None:
        """Let time pass that is waited for at the next sleep."""
        self._ahead_s += seconds

    def sleep(self, seconds: float) -> Awaitable[None]:
        if seconds > 0:
            seconds, self._ahead_s = seconds + self._ahead_s, 0.0
        return self._clock.sleep(seconds)


class Link:
    """A Transport round another one. Bytes are those of bodies, as messages have them on the wire.

    What changes the server waits until it has arrived there; an answer, and all of a download, is spent.
    """

    def __init__(self, inner: Transport, clock: DeviceClock, profile: Profile) -> None:
        self._inner, self._clock, self._profile = inner, clock, profile
        self.sent_bytes = 0
        self.received_bytes = 0  #: without bundles
        self.bundle_bytes = 0
        self.check_ins = 0

    async def enroll(self, message: Enroll) -> Enrolled:
        await self._up(len(encode(message)))
        return self._answered(await self._inner.enroll(message))

    async def check_in(self, message: CheckIn | AsTold) -> CheckInAnswer:
        self.check_ins += 1
        await self._up(len(encode(message)))
        return self._answered(await self._inner.check_in(message))

    async def bundle_file(self, bundle: str, name: str, offset: int) -> AsyncGenerator[bytes, None]:
        self._ask()
        async for piece in self._inner.bundle_file(bundle, name, offset):
            self.download_bundle(len(piece))
            yield piece

    def download_bundle(self, size_bytes: int) -> None:
        """Spend the time of a bundle's bytes that come from somewhere else."""
        self.bundle_bytes += size_bytes
        self._clock.spend(self._profile.down_s(size_bytes))

    async def version(self, sha256: str, limit_bytes: int, held: str | None = None) -> VersionBody:
        self._ask()
        body = await self._inner.version(sha256, limit_bytes, held)
        self._down(len(body.data))
        return body

    async def upload(self, lease: str, frame: bytes) -> Receipt:
        await self._up(len(frame))
        return self._answered(await self._inner.upload(lease, frame))

    async def receipt(self, lease: str) -> Receipt:
        self._ask()
        return self._answered(await self._inner.receipt(lease))

    async def judge(self, lease: str, verdict: Verdict) -> None:
        await self._up(len(encode(verdict)))
        await self._inner.judge(lease, verdict)

    async def fail(self, lease: str, failure: Failure) -> None:
        await self._up(len(encode(failure)))
        await self._inner.fail(lease, failure)

    async def leave(self, *, erase: bool) -> None:
        await self._up(0)
        await self._inner.leave(erase=erase)

    async def close(self) -> None:
        await self._inner.close()

    def _answered(self, answer: M) -> M:
        self._down(len(encode(answer)))
        return answer

    def _up(self, size_bytes: int) -> Awaitable[None]:
        self.sent_bytes += size_bytes
        return self._clock.sleep(self._profile.up_s(size_bytes) + self._profile.latency_s)

    def _ask(self) -> None:
        """A request without a body, for something that is the same whenever it is asked for."""
        self._clock.spend(self._profile.up_s(0) + self._profile.latency_s)

    def _down(self, size_bytes: int) -> None:
        self.received_bytes += size_bytes
        self._clock.spend(self._profile.down_s(size_bytes))
