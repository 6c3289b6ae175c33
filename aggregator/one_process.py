"""One server process, from its settings to its clean end."""

from __future__ import annotations

import asyncio
import gc
import signal
import sys
from collections.abc import Callable

from msgspec import Struct

from aggregator.app import Listening, ServerConfig, serving
from aggregator.limits import raise_file_limit
from aggregator.logs import set_up_log
from aggregator.tracing import Tracer, open_tracer

__all__ = ["Settings", "serve"]

_GARBAGE = (50_000, 20, 100)  #: objects, and collections of the younger, between two collections
_SWITCH_S = 0.0005  #: at most, that the writer waits for requests at work after each statement


class Settings(Struct, frozen=True, kw_only=True):
    """What `fedtt serve` was told."""

    config: ServerConfig
    drain_s: float = 0.0  #: to go on serving once asked to end
    traces: bool = False
    log_json: bool = False
    process: int | None = None  #: its number in the log, where it is one of several


def serve(
    settings: Settings, announce: Callable[[Listening], object], *, ends_with: int | None = None
) -> None:
    """Serve until SIGTERM or SIGINT, then drain and end; all that was acknowledged is on disk.

    announce: called once it listens. ends_with: a descriptor that becomes readable when the process that
    looks after this one is gone: it ends then, too. Raises FedttError where it cannot start.
    """
    set_up_log(as_json=settings.log_json, process=settings.process)
    sys.setswitchinterval(_SWITCH_S)
    raise_file_limit()
    tracer = open_tracer(asked_for=settings.traces)
    try:
        asyncio.run(_until_stopped(settings, tracer, announce, ends_with))
    finally:
        tracer.close()


async def _until_stopped(
    settings: Settings, tracer: Tracer, announce: Callable[[Listening], object], ends_with: int | None
) -> None:
    stopped = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stopped.set)
    if ends_with is not None:
        loop.add_reader(ends_with, stopped.set)
    async with serving(settings.config, tracer) as listening:
        _collect_seldom()
        announce(listening)
        await stopped.wait()
        if ends_with is not None:
            loop.remove_reader(ends_with)
        listening.service.draining = True  # /readyz says so, and a balancer sends nobody any more
        await asyncio.sleep(settings.drain_s)


def _collect_seldom() -> None:
    """What lives as long as the process is never looked at again, and the rest less often.

    A collection stops the loop and every thread.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(*_GARBAGE)
