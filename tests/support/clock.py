"""Time that passes when a test says so."""

from __future__ import annotations

import asyncio

__all__ = ["VirtualClock"]


class VirtualClock:
    """A Clock for tests.

    jump: whoever sleeps moves the clock on and returns at once, which suits one device alone; without it,
    sleepers wait until `advance` has passed their time.
    """

    def __init__(self, start: float = 1_000_000.0, *, jump: bool = True) -> None:
        self._now, self._jump = start, jump
        self._moved = asyncio.Event()
        self.slept_s: list[float] = []  #: what was asked for, in order

    def now(self) -> float:
        return self._now

    async def sleep(self, seconds: float) -> None:
        self.slept_s.append(seconds)
        wake_at = self._now + seconds
        if self._jump:
            self._now = wake_at
            await asyncio.sleep(0)
        while self._now < wake_at:
            await self._moved.wait()

    async def advance(self, seconds: float) -> None:
        """Move the clock on and let everybody who has slept long enough run."""
        self._now += seconds
        self._moved.set()
        self._moved = asyncio.Event()
        await asyncio.sleep(0)
