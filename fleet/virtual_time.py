"""Time that jumps to the next thing that happens: a Clock, and the loop that runs what waits on it.

Lives are coroutines that await nothing but `sleep`, directly or through the code they call. What is due is
run in order of time and, at equal times, in the order in which it was asked for, on one thread: the same
lives give the same order on any machine. This is no asyncio loop, and needs none: a sleep costs a heap entry.
"""

from __future__ import annotations

import gc
import heapq
from asyncio import CancelledError
from collections.abc import Callable, Coroutine, Generator, Iterator
from contextlib import contextmanager
from types import coroutine
from typing import Any, TypeVar

__all__ = ["Life", "VirtualTime", "at_once"]

T = TypeVar("T")
Awaited = Coroutine[Any, Any, T]


class Life:
    """One coroutine under a virtual clock."""

    __slots__ = ("_coroutine", "_time")

    def __init__(self, time: VirtualTime, coroutine: Awaited[None]) -> None:
        self._time = time
        self._coroutine: Awaited[None] | None = coroutine

    @property
    def over(self) -> bool:
        return self._coroutine is None

    def kill(self) -> None:
        """End it where it sleeps, as a power cut would; its `finally` blocks run and may not sleep."""
        coroutine, self._coroutine = self._coroutine, None
        if coroutine is not None:
            coroutine.close()

    def stop(self) -> None:
        """Cancel it where it sleeps, as a clean end of its program would; it may not sleep again."""
        coroutine, self._coroutine = self._coroutine, None
        if coroutine is None:
            return
        try:
            coroutine.throw(CancelledError())
        except (CancelledError, StopIteration):
            return
        coroutine.close()

    def step(self) -> None:
        """Run it to its next sleep, or to its end."""
        coroutine = self._coroutine
        if coroutine is not None:  # else it was ended while it slept
            self._go(coroutine)

    def _go(self, coroutine: Awaited[None]) -> None:
        try:
            wake_at = coroutine.send(None)
        except BaseException as end:
            self._coroutine = None
            if isinstance(end, StopIteration):
                return
            raise
        if type(wake_at) is not float:
            self.kill()
            raise RuntimeError(f"a life under a virtual clock awaited {wake_at!r}, which only asyncio can do")
        self._time.call_at(wake_at, self.step)


class VirtualTime:
    """A Clock whose time passes as fast as its lives can be run; `start_s` is its first, in Unix seconds."""

    def __init__(self, start_s: float = 0.0) -> None:
        self._now = start_s
        self._due: list[tuple[float, int, Callable[[], None]]] = []
        self._asked = 0

    def now(self) -> float:
        return self._now

    @coroutine
    def sleep(self, seconds: float) -> Generator[float, None, None]:
        """Hand the time to wake at to the life that awaits this."""
        if seconds > 0:
            yield self._now + seconds

    def start(self, coroutine: Awaited[None]) -> Life:
        """Run a coroutine to its first sleep, and on from there when its time comes."""
        life = Life(self, coroutine)
        life.step()
        return life

    def call_at(self, at: float, call: Callable[[], None]) -> None:
        """Have something called at a time; at once where that has passed."""
        self._asked += 1
        heapq.heappush(self._due, (at, self._asked, call))

    def run(self, until: Callable[[], bool], end_s: float = float("inf")) -> None:
        """Let time pass until `until`, asked after every call, says so; at most to `end_s`.

        What a life raises comes out here, and the rest can be run on.
        """
        due = self._due
        with _rare_collections():
            while due and not until():
                at, _, call = due[0]
                if at > end_s:
                    self._now = end_s
                    return
                heapq.heappop(due)
                if at > self._now:
                    self._now = at
                call()


@contextmanager
def _rare_collections() -> Iterator[None]:
    """Look for reference cycles less often: sleeping lives are many objects, hold none, and are not garbage.

    With 10,000 of them awake the default thresholds cost a third of the time, and 100,000 objects between two
    looks still a tenth (`benchmarks.fleet`).
    """
    before = gc.get_threshold()
    gc.set_threshold(500_000, 50, 100)
    try:
        yield
    finally:
        gc.set_threshold(*before)


def at_once(coroutine: Awaited[T]) -> T:
    """The result of a coroutine that never sleeps; raises RuntimeError where it does."""
    try:
        coroutine.send(None)
    except StopIteration as end:
        result: T = end.value
        return result
    coroutine.close()
    raise RuntimeError("this coroutine was to end without sleeping")
