"""A bounded queue that is fair between whoever fills it: who floods it waits and is refused, nobody else."""

from __future__ import annotations

from collections import deque
from typing import Generic, TypeVar

__all__ = ["FairQueue"]

T = TypeVar("T")


class FairQueue(Generic[T]):
    """Items by who brought them. Each has the same share of what is taken and, once it is full, of the room.

    One alone may use all of the room. Where another comes later, the newest item of whoever has most waiting
    makes room for it, as in longest queue drop (Suter et al. 1999): n that flood it hold an n-th each.
    """

    def __init__(self, limit: int) -> None:
        """limit: of items that wait, those put with `always` not counted."""
        self._limit = limit
        self._count = 0  #: of those that are
        self._arrivals = 0
        self._always: deque[tuple[int, T]] = deque()
        self._waiting: dict[str, deque[tuple[int, T]]] = {}  #: by whose it is, whoever's turn is next first

    def __len__(self) -> int:
        return self._count + len(self._always)

    def put_always(self, item: T) -> None:
        """Add an item that is never refused, and taken next."""
        self._always.append(self._arrived(item))

    def put(self, whose: str, item: T) -> tuple[str, T] | None:
        """Add an item; returns whose newest one had to go for it and which, where the queue is full.

        That may be this very item.
        """
        gone = None
        if self._count >= self._limit:
            most = max(self._waiting, key=lambda name: len(self._waiting[name]), default=whose)
            if len(self._waiting.get(whose, ())) + 1 >= len(self._waiting.get(most, ())):
                return whose, item
            gone = most, self._waiting[most].pop()[1]
            self._count -= 1
        self._waiting.setdefault(whose, deque()).append(self._arrived(item))
        self._count += 1
        return gone

    def take(self, most: int) -> list[T]:
        """Remove up to `most` items, one of each in turn; those taken keep the order in which they came."""
        taken = [self._always.popleft() for _ in range(min(most, len(self._always)))]
        while len(taken) < most and self._waiting:
            whose = next(iter(self._waiting))
            waiting = self._waiting.pop(whose)
            taken.append(waiting.popleft())
            self._count -= 1
            if waiting:
                self._waiting[whose] = waiting  # behind all others
        return [item for _, item in sorted(taken, key=lambda arrival: arrival[0])]

    def _arrived(self, item: T) -> tuple[int, T]:
        self._arrivals += 1
        return self._arrivals, item
