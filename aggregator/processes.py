"""Several server processes on one port under one command: started, looked after, ended together."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
from collections.abc import Callable, Coroutine, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from msgspec.structs import replace

from aggregator.app import ServerConfig, not_listening
from aggregator.member import Member, Said
from aggregator.one_process import Settings
from fedtt.errors import ConfigError, FedttError

__all__ = ["serve_together"]

_LAST_PORT = 65535
T = TypeVar("T")
_log = logging.getLogger("fedtt.aggregator")


class _NobodyServesError(FedttError):
    """All processes fail at once, again and again."""


async def serve_together(settings: Settings, count: int, announce: Callable[[list[Said]], None]) -> bool:
    """Run so many processes until SIGTERM or SIGINT; one that dies is started again. Whether all ended well.

    It also ends where all of them fail again and again and none serves, for whoever started it to see. They
    share the devices' port; the administrators' ports follow one another, for each process counts for itself.
    announce: called once all listen. Raises FedttError where one cannot start.
    """
    with _one_port(settings.config) as port:
        shared = replace(settings.config, port=port, reuse_port=True)
        members = [
            Member(replace(settings, config=replace(shared, admin_port=admin_port), process=number))
            for number, admin_port in enumerate(_admin_ports(shared, count), 1)
        ]
        looking = asyncio.create_task(_look_after(members, announce))
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, looking.cancel)
        asked_to = True
        try:
            with contextlib.suppress(asyncio.CancelledError):
                await looking
                asked_to = False
        finally:
            ended_well = await asyncio.gather(*(member.end() for member in members))
        return asked_to and all(ended_well)


async def _look_after(members: list[Member], announce: Callable[[list[Said]], None]) -> None:
    """Until cancelled, or nobody serves and there is no hope that one will."""

    def look() -> None:
        if all(member.is_hopeless for member in members):
            raise _NobodyServesError

    first = await members[0].start()  # it makes tokens and tables
    announce([first, *await _all_of(member.start() for member in members[1:])])
    try:
        await _all_of(member.keep_running(look) for member in members)
    except _NobodyServesError:
        _log.critical("no process serves, all have failed again and again, see above: giving up")


async def _all_of(each: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """At the same time; where one fails the others are given up."""
    tasks = [asyncio.create_task(one) for one in each]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()


def _admin_ports(config: ServerConfig, count: int) -> list[int]:
    """One for each process; 0 where any will do. Raises ConfigError where they do not fit."""
    first = config.admin_port
    if not first:
        return [0] * count
    ports = list(range(first, first + count))
    if ports[-1] > _LAST_PORT:
        allowed = f"at most {_LAST_PORT - count + 1} with {count} processes"
        raise ConfigError("--admin-port", first, allowed)
    if config.port in ports and config.host == config.admin_host:
        allowed = f"one with {count} free ports from it on, --port {config.port} not among them"
        raise ConfigError("--admin-port", first, allowed)
    return ports


@contextmanager
def _one_port(config: ServerConfig) -> Iterator[int]:
    """The port that all share, kept while none of them listens; free before, unless others may share it, too.

    Raises ConfigError where it cannot be had.
    """
    try:
        family, kind, _, _, address = socket.getaddrinfo(config.host, config.port, type=socket.SOCK_STREAM)[0]
        if not config.reuse_port:
            with socket.socket(family, kind) as alone:
                alone.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                alone.bind(address)
        held = socket.socket(family, kind)
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        held.bind(address)
    except OSError as error:
        raise not_listening(error, config.host, config.port) from None
    with held:
        yield held.getsockname()[1]
