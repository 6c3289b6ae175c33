"""Work in groups: requests that ask alike at the same time are answered together, off the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any, Generic, Protocol, TypeVar

from fedtt.errors import UnavailableError

__all__ = ["AnswerAll", "Answers", "Together", "each_alone"]

A = TypeVar("A")
A_contra = TypeVar("A_contra", contravariant=True)
T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)
AnswerAll = Callable[[Sequence[A]], list[T]]
_GROUP = 128  #: most questions answered together, so that crowds move on in parts


class Answers(Protocol[A_contra, T_co]):
    """Whom questions are put to, one by one."""

    async def ask(self, question: A_contra, /) -> T_co: ...


class _Asked(Generic[A, T]):
    """One question and the future of whoever asked."""

    def __init__(self, question: A) -> None:
        self.question = question
        self.future: asyncio.Future[T] = asyncio.get_running_loop().create_future()


class Together(Generic[A, T]):
    """Answers all that have asked since it last did, on a thread; nobody waits for company."""

    def __init__(self, answer_all: AnswerAll[A, T]) -> None:
        self._answer_all = answer_all
        self._waiting: list[_Asked[A, T]] = []
        self._at_work: asyncio.Task[None] | None = None

    async def ask(self, question: A) -> T:
        asked: _Asked[A, T] = _Asked(question)
        self._waiting.append(asked)
        if self._at_work is None:
            self._at_work = asyncio.create_task(self._work())
        return await asked.future

    async def _work(self) -> None:
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
        return each_alone(self._answer_all, questions)


def each_alone(answer_all: AnswerAll[A, T], asked: Sequence[A]) -> list[T | Exception]:
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
