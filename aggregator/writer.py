"""Group commit: many requests, one transaction, one sync to disk, and only then the answers."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Generic, TypeVar

from aggregator.together import each_alone
from fedtt.errors import FedttError
from fedtt.messages import UpdateState
from storage.store import Store, Transaction

__all__ = ["QueueFullError", "Writer"]

A = TypeVar("A")
T = TypeVar("T")
ChangeAll = Callable[[Transaction, Sequence[A]], list[T]]
Observe = Callable[[int, float, Mapping[UpdateState, int]], None]
_GROUP = 256  #: most changes in one transaction


class QueueFullError(FedttError):
    """More changes wait than the server takes; the caller answers BUSY."""


class _Pending(Generic[A, T]):
    """One item of a change that takes many, and the future of whoever waits for it."""

    def __init__(self, change_all: ChangeAll[A, T], item: A) -> None:
        self.change_all, self.item = change_all, item
        self.future: asyncio.Future[T] = asyncio.get_running_loop().create_future()

    def resolve(self, outcome: T | BaseException) -> None:
        if self.future.done():  # whoever waited has gone; the change is durable all the same
            return
        if isinstance(outcome, BaseException):
            self.future.set_exception(outcome)
        else:
            self.future.set_result(outcome)


class Writer:
    """The only place that writes: changes queue here and commit in groups on one thread.

    Requests are refused while `queue_limit` changes wait. The server's own few changes never are: a round
    must close under any load. `observe` is told of each commit: its changes, its seconds and what became of
    how many updates; it is called on the writer's thread.
    """

    def __init__(self, store: Store, *, queue_limit: int = 4096, observe: Observe | None = None) -> None:
        self._store = store
        self._limit = queue_limit
        self._observe = observe
        self._queue: asyncio.Queue[_Pending[Any, Any]] = asyncio.Queue()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="fedtt-writer")
        self._task: asyncio.Task[None] | None = None

    def waiting(self) -> int:
        """How many changes wait for a commit."""
        return self._queue.qsize()

    async def request(self, change: Callable[[Transaction], T]) -> T:
        """Run someone else's change; raises QueueFullError where too many wait."""
        return await self.request_together(_each, change)

    async def request_together(self, change_all: ChangeAll[A, T], item: A) -> T:
        """The same for a change that takes all items of a commit at once, and has an outcome for each."""
        if self.waiting() >= self._limit:
            raise QueueFullError(f"{self._limit} changes wait already; come back later")
        return await self._run(change_all, item)

    async def run(self, change: Callable[[Transaction], T]) -> T:
        """Answer once the change is durable. It may run twice, so it acts through its transaction alone."""
        return await self._run(_each, change)

    async def _run(self, change_all: ChangeAll[A, T], item: A) -> T:
        pending = _Pending(change_all, item)
        self._queue.put_nowait(pending)
        return await pending.future

    async def maintain(self) -> bool:
        """Have settled payloads leave the disk, between two commits; False where that has to wait."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._store.maintain)

    def start(self) -> None:
        self._task = asyncio.create_task(self._loop())

    async def stop(self) -> None:
        """Commit what waits, then end."""
        await self._queue.join()
        if self._task is not None:
            self._task.cancel()
        self._thread.shutdown()

    async def _loop(self) -> None:
        while True:
            group = [await self._queue.get()]
            while len(group) < _GROUP and not self._queue.empty():
                group.append(self._queue.get_nowait())
            outcomes = await asyncio.get_running_loop().run_in_executor(self._thread, self._commit, group)
            for pending, outcome in zip(group, outcomes, strict=True):
                pending.resolve(outcome)
                self._queue.task_done()

    def _commit(self, group: Sequence[_Pending[Any, Any]]) -> list[Any]:
        return each_alone(self._commit_all, group)

    def _commit_all(self, group: Sequence[_Pending[Any, Any]]) -> list[Any]:
        started = time.perf_counter()
        alike: dict[ChangeAll[Any, Any], list[int]] = {}
        for place, pending in enumerate(group):
            alike.setdefault(pending.change_all, []).append(place)
        outcomes: list[Any] = [None] * len(group)
        with self._store.transaction() as tx:
            for change_all, places in alike.items():
                for place, outcome in zip(
                    places, change_all(tx, [group[place].item for place in places]), strict=True
                ):
                    outcomes[place] = outcome
        if self._observe is not None:
            self._observe(len(group), time.perf_counter() - started, tx.moved)
        return outcomes


def _each(tx: Transaction, changes: Sequence[Callable[[Transaction], Any]]) -> list[Any]:
    return [change(tx) for change in changes]
