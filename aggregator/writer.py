"""Group commit: many requests, one transaction, one sync to disk, and only then the answers."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Generic, TypeVar

from aggregator.fair_queue import FairQueue
from aggregator.together import each_alone
from fedtt.errors import FedttError, StorageError
from fedtt.messages import UpdateState
from storage.store import Store, Transaction

__all__ = ["QUEUE_LIMIT", "QueueFullError", "Writer"]

A = TypeVar("A")
T = TypeVar("T")
ChangeAll = Callable[[Transaction, Sequence[A]], list[T]]
Observe = Callable[[int, float, Mapping[UpdateState, int]], None]
Refused = Callable[[str], None]
QUEUE_LIMIT = 4096  #: requests that wait for a commit, unless said otherwise
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

    At most `queue_limit` requests wait; tasks share that room and each commit fairly, whoever floods them.
    The server's own few changes are never refused: a round must close under any load. `observe` is told of
    each commit: its changes, its seconds and what became of how many updates; it is called on the writer's
    thread. `refused` is told of each request that found no room, by its task.
    """

    def __init__(
        self,
        store: Store,
        *,
        queue_limit: int = QUEUE_LIMIT,
        observe: Observe | None = None,
        refused: Refused | None = None,
    ) -> None:
        self._store = store
        self._limit = queue_limit
        self._observe = observe
        self._refused = refused
        self._queue: FairQueue[_Pending[Any, Any]] = FairQueue(queue_limit)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="fedtt-writer")
        self._task: asyncio.Task[None] | None = None
        self._news = asyncio.Event()  #: something was queued, or this ends
        self._ending = False

    def waiting(self) -> int:
        """How many changes wait for a commit."""
        return len(self._queue)

    async def request(self, change: Callable[[Transaction], T], *, task: str = "") -> T:
        """Run someone else's change; raises QueueFullError where too many wait.

        task: the name of the task it is about, if any; those of one task wait for one another first.
        """
        return await self.request_together(_each, change, task=task)

    async def request_together(self, change_all: ChangeAll[A, T], item: A, *, task: str = "") -> T:
        """The same for a change that takes all items of a commit at once, and has an outcome for each."""
        pending = _Pending(change_all, item)
        if gone := self._queue.put(task, pending):
            whose, unlucky = gone
            unlucky.resolve(QueueFullError(f"{self._limit} changes wait already; come back later"))
            if self._refused is not None:
                self._refused(whose)
        self._news.set()
        return await pending.future

    async def run(self, change: Callable[[Transaction], T]) -> T:
        """Answer once the change is durable. It may run twice, so it acts through its transaction alone."""
        pending: _Pending[Any, T] = _Pending(_each, change)
        self._queue.put_always(pending)
        self._news.set()
        return await pending.future

    async def maintain(self) -> bool:
        """Have settled payloads leave the disk, a few between two commits; False where a log has to wait.

        It ends under any load: whoever waits for it settles no more meanwhile.
        """
        run = asyncio.get_running_loop().run_in_executor
        while await run(self._thread, self._store.wipe):
            pass
        return await run(self._thread, self._store.maintain)

    def start(self) -> None:
        self._task = asyncio.create_task(self._loop())

    async def stop(self) -> None:
        """Commit what waits, wipe what is settled, then end."""
        if self._ending:
            return
        self._ending = True
        self._news.set()
        if self._task is not None:
            await self._task
        with contextlib.suppress(StorageError):  # else whoever opens the ledger next does it
            await self.maintain()
        self._thread.shutdown()

    async def _loop(self) -> None:
        while self._queue or not self._ending:
            if not self._queue:
                self._news.clear()
                await self._news.wait()
                continue
            group = self._queue.take(_GROUP)
            outcomes = await asyncio.get_running_loop().run_in_executor(self._thread, self._commit, group)
            for pending, outcome in zip(group, outcomes, strict=True):
                pending.resolve(outcome)

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
