"""Blocking work beside the event loop of the app that a device lives in."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from typing import ParamSpec, Protocol, TypeVar

__all__ = ["Aside", "beside"]

P = ParamSpec("P")
T = TypeVar("T")


class Aside(Protocol):
    """How a call that may block is made: `beside` the loop, or where nobody waits at once."""

    async def __call__(self, function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T: ...


async def beside(function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
    """Call it on a thread. Cancelling waits for its end: nothing goes on behind whoever comes next."""
    future = asyncio.get_running_loop().run_in_executor(None, partial(function, *args, **kwargs))
    try:
        return await asyncio.shield(future)
    except asyncio.CancelledError:
        await asyncio.wait([future])
        if not future.cancelled():
            future.exception()  # seen: it comes too late to matter
        raise
