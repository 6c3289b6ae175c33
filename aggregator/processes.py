"""Several server processes on one port under one command: started, looked after, ended together."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import multiprocessing
import signal
import socket
import sys
from collections.abc import Callable, Coroutine, Iterable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnContext, SpawnProcess
from typing import Any, Self, TypeVar

from msgspec import Struct
from msgspec.structs import replace

from aggregator.app import Listening, ServerConfig, not_listening
from aggregator.one_process import Settings, serve
from fedtt.errors import ConfigError, FedttError

__all__ = ["Said", "serve_together"]

_AGAIN_S = 1.0  #: between the death of a process and the start of the next
_SELDOM_S = 30.0  #: the longest that this becomes where it does not start
_END_S = 20.0  #: beyond the drain, that a process may take to end
_LAST_PORT = 65535
T = TypeVar("T")
_log = logging.getLogger("fedtt.aggregator")


class Said(Struct, frozen=True, kw_only=True):
    """Where a started process can be reached, or why it could not start."""

    url: str = ""
    admin_url: str = ""
    enrolment_token: str = ""
    error: str = ""

    @classmethod
    def of(cls, listening: Listening) -> Self:
        return cls(
            url=listening.url,
            admin_url=listening.admin_url,
            enrolment_token=listening.enrolment_token,
        )


async def serve_together(settings: Settings, count: int, announce: Callable[[list[Said]], None]) -> bool:
    """Run so many processes until SIGTERM or SIGINT; one that dies is started again. Whether all ended well.

    They share the devices' port; the administrators' ports follow one another, for each process counts for
    itself. announce: called once all listen. Raises FedttError where one cannot start.
    """
    with _one_port(settings.config) as port:
        shared = replace(settings.config, port=port, reuse_port=True)
        members = [
            _Member(replace(settings, config=replace(shared, admin_port=admin_port)))
            for admin_port in _admin_ports(shared, count)
        ]
        looking = asyncio.create_task(_look_after(members, announce))
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, looking.cancel)
        try:
            with contextlib.suppress(asyncio.CancelledError):
                await looking
        finally:
            ended_well = await asyncio.gather(*(member.end() for member in members))
        return all(ended_well)


async def _look_after(members: list[_Member], announce: Callable[[list[Said]], None]) -> None:
    first = await members[0].start()  # it makes tokens and tables
    announce([first, *await _all_of(member.start() for member in members[1:])])
    await _all_of(member.keep_running() for member in members)


async def _all_of(each: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """At the same time; where one fails the others are given up."""
    tasks = [asyncio.create_task(one) for one in each]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()


class _Member:
    """One process and all that follow in its place."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._context: SpawnContext = multiprocessing.get_context("spawn")
        self._process: SpawnProcess | None = None

    async def start(self) -> Said:
        """Raises FedttError with its reason where it does not come to listen."""
        hears, tells = self._context.Pipe(duplex=False)
        with hears:
            with tells:
                process = self._context.Process(target=_run, args=(self._settings, tells))
                process.start()
            self._process = process
            await _readable(hears.fileno())
            try:
                said: Said = hears.recv()
            except EOFError:
                said = Said(error="a server process ended before it listened")
        if said.error:
            raise FedttError(said.error)
        port = int(said.admin_url.rpartition(":")[2])  # whoever follows is reached where this one was
        config = replace(self._settings.config, admin_port=port)
        self._settings = replace(self._settings, config=config)
        return said

    async def keep_running(self) -> None:
        while True:
            assert self._process is not None  # noqa: S101  # started
            await _readable(self._process.sentinel)
            self._process.join()
            _log.error("a server process ended with status %s: starting another", self._process.exitcode)
            await self._start_again()

    async def _start_again(self) -> None:
        """As soon as it can be: the others go on meanwhile."""
        wait_s = _AGAIN_S
        while True:
            await asyncio.sleep(wait_s)
            try:
                await self.start()
            except (FedttError, OSError) as error:
                wait_s = min(2 * wait_s, _SELDOM_S)
                _log.error("a server process did not start, again in %g s: %s", wait_s, error)
            else:
                return

    async def end(self) -> bool:
        """Whether it ended well, or was not there. One that hangs is killed, and loses nothing by it."""
        process = self._process
        if process is None or not process.is_alive():
            return True
        process.terminate()
        try:
            async with asyncio.timeout(self._settings.drain_s + _END_S):
                await _readable(process.sentinel)
        except TimeoutError:
            process.kill()
            await _readable(process.sentinel)
        process.join()
        ended_well = process.exitcode in {0, -signal.SIGTERM}  # the latter before it has served
        if not ended_well:
            _log.error("a server process did not end by itself but with status %s", process.exitcode)
        return ended_well


async def _readable(descriptor: int) -> None:
    loop, ready = asyncio.get_running_loop(), asyncio.Event()
    loop.add_reader(descriptor, ready.set)
    try:
        await ready.wait()
    finally:
        loop.remove_reader(descriptor)


def _run(settings: Settings, tells: Connection) -> None:
    """In the new process: it ends when asked to, and when the one that started it is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # until it serves; its parent tells it of a Ctrl-C
    parent = multiprocessing.parent_process()
    assert parent is not None  # noqa: S101
    with tells:
        try:
            serve(settings, lambda listening: _tell(tells, Said.of(listening)), ends_with=parent.sentinel)
        except FedttError as error:
            if not _tell(tells, Said(error=str(error))):
                _log.error("%s", error)
            sys.exit(2)


def _tell(tells: Connection, said: Said) -> bool:
    """Whether there is still somebody who listens."""
    try:
        tells.send(said)
    except BrokenPipeError:
        return False
    return True


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
