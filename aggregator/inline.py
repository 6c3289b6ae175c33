"""A server on its caller's own thread, for emulators: where nobody waits, nothing needs to be handed over."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Generic, ParamSpec, Protocol, TypeVar

from aggregator.together import AnswerAll
from storage.store import Store, Transaction

__all__ = ["Aside", "InlineTogether", "InlineWriter", "at_once"]

P = ParamSpec("P")
A = TypeVar("A")
T = TypeVar("T")


class Aside(Protocol):
    """How a blocking call is made: `asyncio.to_thread`, or `at_once`."""

    async def __call__(self, function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T: ...


async def at_once(function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
    """Call it here and now, on whatever drives this coroutine."""
    return function(*args, **kwargs)


class InlineWriter:
    """What `aggregator.writer.Writer` does, with a transaction for each change and no queue before it."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def waiting(self) -> int:
        return 0

    async def request(self, change: Callable[[Transaction], T], *, task: str = "") -> T:
        with self._store.transaction() as tx:
            return change(tx)

    run = request

    async def request_together(
        self, change_all: Callable[[Transaction, Sequence[A]], list[T]], item: A, *, task: str = ""
    ) -> T:
        with self._store.transaction() as tx:
            (outcome,) = change_all(tx, [item])
            return outcome

    async def maintain(self) -> bool:
        while self._store.wipe():
            pass
        return self._store.maintain()

    def start(self) -> None:
        """There is nothing to start."""

    async def stop(self) -> None:
        """And nothing that waits."""


class InlineTogether(Generic[A, T]):
    """What `aggregator.together.Together` does, one question at a time."""

    def __init__(self, answer_all: AnswerAll[A, T]) -> None:
        self._answer_all = answer_all

    async def ask(self, question: A) -> T:
        (answer,) = self._answer_all([question])
        return answer
