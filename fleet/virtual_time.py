"""Time that jumps to the next thing that happens: a Clock, and the loop that runs what waits on it.

Lives are coroutines that await nothing but `sleep`, directly or through the code they call. What is due is
run in order of time and, at equal times, in the order in which it was asked for, on one thread: the same
lives give the same order on any machine. This is no asyncio loop, and needs none: a sleep costs a heap entry.
"""

from __future__ import annotations

import gc
from asyncio import CancelledError
from collections.abc import Callable, Coroutine, Generator, Iterator
from contextlib import contextmanager, suppress
from heapq import heappop, heappush
from types import coroutine
from typing import Any, TypeVar

from fedtt.errors import Declined

__all__ = ["Life", "VirtualTime", "at_once"]

T = TypeVar("T")
Awaited = Coroutine[Any, Any, T]


class Life:
    """One coroutine under a virtual clock."""

    __slots__ = ("coroutine",)

    def __init__(self, coroutine: Awaited[None]) -> None:
        self.coroutine: Awaited[None] | None = coroutine  #: None once it has ended

    @property
    def over(self) -> bool:
        return self.coroutine is None

    def kill(self) -> None:
        """End it where it sleeps, as a power cut would; its `finally` blocks run and may not sleep."""
        coroutine, self.coroutine = self.coroutine, None
        if coroutine is not None:
            coroutine.close()

    def stop(self) -> None:
        """Cancel it where it sleeps, as a clean end of its program would; it may not sleep again."""
        coroutine, self.coroutine = self.coroutine, None
        if coroutine is None:
            return
        try:
            coroutine.throw(CancelledError())
        except (CancelledError, StopIteration):
            return
        coroutine.close()


class VirtualTime:
    """A Clock whose time passes as fast as its lives can be run; `start_s` is its first, in Unix seconds."""

    def __init__(self, start_s: float = 0.0) -> None:
        self._now = start_s
        self._due: list[tuple[float, int, Life | Callable[[], None]]] = []
        self._asked = 0

    def now(self) -> float:
        return self._now

    @property
    def waiting(self) -> int:
        """Sleeps and calls whose time has not come."""
        return len(self._due)

    @coroutine
    def sleep(self, seconds: float) -> Generator[float, None, None]:
        """Hand the time to wake at to the life that awaits this."""
        if seconds > 0:
            yield self._now + seconds

    @coroutine
    def held(
        self, work: Callable[[], Awaited[T]], broken: Callable[[], Awaited[str]], every_s: float
    ) -> Generator[float, None, T]:
        """Do the work as long as `broken`, asked every so many seconds, has nothing to say.

        As `edge_client.conditions.while_holding`: raises Declined with what it said, once the work has ended,
        unless that came to its end meanwhile.
        """
        if why := at_once(broken()):
            raise Declined(why)
        life, look_at = work(), self._now + every_s
        try:
            wake_at = life.send(None)
            while True:
                yield min(wake_at, look_at)
                if wake_at <= look_at:
                    wake_at = life.send(None)
                    continue
                look_at += every_s
                if why := at_once(broken()):
                    _cancel(life)
                    raise Declined(why)
        except StopIteration as end:
            result: T = end.value
            return result
        except CancelledError:
            with suppress(StopIteration):
                _cancel(life)
            raise
        finally:
            life.close()

    def start(self, coroutine: Awaited[None]) -> Life:
        """Run a coroutine to its first sleep, and on from there when its time comes."""
        life = Life(coroutine)
        self._go_on(life)
        return life

    def _go_on(self, life: Life) -> None:
        """Run a life to its next sleep, or to its end."""
        if life.coroutine is None:  # it was ended while it slept
            return
        try:
            wake_at = life.coroutine.send(None)
        except BaseException as end:
            life.coroutine = None
            if isinstance(end, StopIteration):
                return
            raise
        if type(wake_at) is not float:
            life.kill()
            raise RuntimeError(f"a life under a virtual clock awaited {wake_at!r}, which only asyncio can do")
        self._asked += 1
        heappush(self._due, (wake_at, self._asked, life))

    def call_at(self, at: float, call: Callable[[], None]) -> None:
        """Have something called at a time; at once where that has passed."""
        self._asked += 1
        heappush(self._due, (at, self._asked, call))

    def run(self, until: Callable[[], bool], end_s: float = float("inf")) -> None:
        """Let time pass to `end_s` at most, or until `until` says so: it is asked first and after every call.

        What a life raises comes out here, and the rest can be run on.
        """
        due = self._due
        with _rare_collections():
            if until():
                return
            while due:
                if due[0][0] > end_s:
                    self._now = end_s
                    return
                at, _, next_one = heappop(due)
                if at > self._now:
                    self._now = at
                if isinstance(next_one, Life):
                    self._go_on(next_one)
                    continue
                next_one()
                if until():
                    return


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


def _cancel(life: Awaited[Any]) -> None:
    """Cancel a coroutine where it sleeps; raises StopIteration where it has a result all the same."""
    with suppress(CancelledError):
        life.throw(CancelledError())
        raise RuntimeError("what was cancelled went to sleep again")


def at_once(coroutine: Awaited[T]) -> T:
    """The result of a coroutine that never sleeps; raises RuntimeError where it does."""
    try:
        coroutine.send(None)
    except StopIteration as end:
        result: T = end.value
        return result
    coroutine.close()
    raise RuntimeError("this coroutine was to end without sleeping")
