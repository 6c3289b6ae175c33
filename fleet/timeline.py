"""What runs the devices of a fleet: `fleet.virtual_time`, or the machine's own (`fleet.real_time`)."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, Protocol, TypeVar

from fedtt.seams import Clock

__all__ = ["Running", "Timeline"]

T = TypeVar("T")


class Running(Protocol):
    """A coroutine that was started."""

    @property
    def over(self) -> bool: ...

    def stop(self) -> None:
        """Cancel it."""
        ...

    def kill(self) -> None:
        """Drop it where it is."""
        ...


class Timeline(Clock, Protocol):
    """A clock that also runs what waits on it."""

    def start(self, coroutine: Coroutine[Any, Any, None]) -> Running: ...

    def call_at(self, at: float, call: Callable[[], None]) -> None: ...

    def held(
        self,
        work: Callable[[], Coroutine[Any, Any, T]],
        broken: Callable[[], Coroutine[Any, Any, str]],
        every_s: float,
    ) -> Awaitable[T]:
        """What `edge_client.conditions.while_holding` does, in this time."""
        ...
