"""The two seams of the system: how time passes and how bytes travel.

Everything else is the real thing everywhere: the fleet emulator runs the device's own code under a
virtual `Clock` and another `Transport`, and faults are wrappers round a transport.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable
from typing import Protocol

from msgspec import Struct

from fedtt.messages import AsTold, CheckIn, CheckInAnswer, Enroll, Enrolled, Failure, Receipt, Verdict

__all__ = ["Clock", "SystemClock", "Transport", "VersionBody"]


class Clock(Protocol):
    """Where every program takes the time from."""

    def now(self) -> float:
        """Seconds since the Unix epoch."""
        ...

    def sleep(self, seconds: float) -> Awaitable[None]:
        """Return after `seconds` of this clock's time."""
        ...


class SystemClock:
    """The machine's own clock."""

    def now(self) -> float:
        return time.time()

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)


class VersionBody(Struct, frozen=True, kw_only=True):
    """What a server answers to a device that wants a version and may hold another one."""

    data: bytes  #: the version's canonical bytes, or their difference (`fedtt.codec.difference`)
    difference: bool = False  #: which of the two


class Transport(Protocol):
    """A device's way to its aggregator.

    Every call raises Refused with the server's typed Problem, WireError for an answer that is not the
    protocol's, or Unreachable when the outcome is unknown; each may be repeated without harm.
    """

    async def enroll(self, message: Enroll) -> Enrolled: ...

    async def check_in(self, message: CheckIn | AsTold) -> CheckInAnswer:
        """Ask for work; `Tell` is an answer to `AsTold` alone."""
        ...

    def bundle_file(self, bundle: str, name: str, offset: int) -> AsyncGenerator[bytes, None]:
        """The bytes of one file from `offset` on, in pieces; a caller that stops early closes it."""
        ...

    async def version(self, sha256: str, limit_bytes: int, held: str | None = None) -> VersionBody:
        """A version, whole or as its difference from `held`, the sha256 of one that the caller has.

        Which of the two is the server's choice, whole where `held` is None; nothing is checked here, and
        no more than `limit_bytes` are read.
        """
        ...

    async def upload(self, lease: str, frame: bytes) -> Receipt: ...

    async def receipt(self, lease: str) -> Receipt:
        """What has become of an acknowledged update."""
        ...

    async def judge(self, lease: str, verdict: Verdict) -> None:
        """Say what a version came to that the server asked about."""
        ...

    async def fail(self, lease: str, failure: Failure) -> None:
        """Give a lease back."""
        ...

    async def leave(self, *, erase: bool) -> None:
        """Take this device out of the population; with `erase`, have the server forget it too."""
        ...

    async def close(self) -> None: ...
