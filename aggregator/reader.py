"""Group reading: requests that ask alike at the same time share one look at the store."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

from fedtt.errors import UnavailableError
from storage.store import Store, Transaction

__all__ = ["Reader", "each_alone"]

A = TypeVar("A")
T = TypeVar("T")
_GROUP = 256  #: most questions in one look


class _Asked(Generic[A, T]):
    """One question and the future of whoever asked."""

    def __init__(self, question: A) -> None:
        self.question = question
        self.future: asyncio.Future[T] = asyncio.get_running_loop().create_future()


class Reader(Generic[A, T]):
    """Looks at the store for all that have asked since the last look; nobody waits for company.

    look: answers many questions from one state of the store, on a thread.
    """

    def __init__(self, store: Store, look: Callable[[Transaction, Sequence[A]], list[T]]) -> None:
        self._store, self._look = store, look
        self._waiting: list[_Asked[A, T]] = []
        self._at_work: asyncio.Task[None] | None = None

    async def ask(self, question: A) -> T:
        asked: _Asked[A, T] = _Asked(question)
        self._waiting.append(asked)
        if self._at_work is None:
            self._at_work = asyncio.create_task(self._answer_all())
        return await asked.future

    async def _answer_all(self) -> None:
        try:
            while self._waiting:
                group, self._waiting = self._waiting[:_GROUP], self._waiting[_GROUP:]
                answers = await asyncio.to_thread(self._answers, [asked.question for asked in group])
                for asked, answer in zip(group, answers, strict=True):
                    if asked.future.done():  # whoever asked has gone
                        continue
                    if isinstance(answer, BaseException):
                        asked.future.set_exception(answer)
                    else:
                        asked.future.set_result(answer)
        finally:
            self._at_work = None

    def _answers(self, questions: Sequence[A]) -> list[Any]:
        return each_alone(self._all, questions)

    def _all(self, questions: Sequence[A]) -> list[T]:
        with self._store.reading() as tx:
            return self._look(tx, questions)


def each_alone(answer_all: Callable[[Sequence[A]], list[T]], asked: Sequence[A]) -> list[T | Exception]:
    """All at once; where that fails, one by one, so that only the guilty one sees the error.

    A database that cannot be reached is everybody's error: asking once more for each would take for ever.
    """
    try:
        return [*answer_all(asked)]
    except UnavailableError as error:
        return [error for _ in asked]
    except Exception as error:
        if len(asked) == 1:
            return [error]
        return [answer for one in asked for answer in each_alone(answer_all, [one])]
