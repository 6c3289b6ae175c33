"""Blocking work beside the event loop of the app that a device lives in."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from typing import Any, ParamSpec, Protocol, TypeVar

__all__ = ["Aside", "beside", "settled"]

P = ParamSpec("P")
T = TypeVar("T")


class Aside(Protocol):
    """How a call that may block is made: `beside` the loop, or where nobody waits at once."""

    async def __call__(self, function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T: ...


async def beside(function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
    """Call it on a thread. Cancelling waits for its end: nothing goes on behind whoever comes next."""
    future = asyncio.get_running_loop().run_in_executor(None, partial(function, *args, **kwargs))
    await settled(future)
    return future.result()


async def settled(future: asyncio.Future[Any], stop: Callable[[], object] = lambda: None) -> None:
    """Wait until it is done. Cancelling, however often, calls `stop`, waits for its end and then cancels."""
    cancelled: asyncio.CancelledError | None = None
    while not future.done():
        try:
            await asyncio.wait([future])
        except asyncio.CancelledError as error:
            cancelled = error
            stop()
    if cancelled is not None:
        if not future.cancelled():
            future.exception()  # seen: it comes too late to matter
        raise cancelled
