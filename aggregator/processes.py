"""Several server processes on one port under one command: started, looked after, ended together."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import multiprocessing
import signal
import socket
from collections.abc import Callable, Coroutine, Iterable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnContext, SpawnProcess
from typing import Any, Self, TypeVar

from msgspec import Struct
from msgspec.structs import replace

from aggregator.app import Listening
from aggregator.one_process import Settings, serve
from fedtt.errors import ConfigError, FedttError

__all__ = ["Said", "serve_together"]

_AGAIN_S = 1.0  #: between the death of a process and the start of the next
_SELDOM_S = 30.0  #: the longest that this becomes where it does not start
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


async def serve_together(settings: Settings, count: int, announce: Callable[[list[Said]], None]) -> None:
    """Run so many processes until SIGTERM or SIGINT; one that dies is started again.

    They share the devices' port; the administrators' ports follow one another, for each process counts for
    itself. announce: called once all listen. Raises FedttError where one cannot start.
    """
    with _one_port(settings.config.host, settings.config.port) as port:
        shared = replace(settings.config, port=port, reuse_port=True)
        first = shared.admin_port
        if first + count - 1 > _LAST_PORT:
            raise ConfigError(
                "--admin-port", first, f"at most {_LAST_PORT - count + 1} with {count} processes"
            )
        members = [
            _Member(replace(settings, config=replace(shared, admin_port=first and first + number)))
            for number in range(count)
        ]
        looking = asyncio.create_task(_look_after(members, announce))
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, looking.cancel)
        try:
            with contextlib.suppress(asyncio.CancelledError):
                await looking
        finally:
            await asyncio.gather(*(member.end() for member in members))


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

    async def end(self) -> None:
        if self._process is not None and self._process.is_alive():
            self._process.terminate()
            await _readable(self._process.sentinel)


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
            _tell(tells, Said(error=str(error)))


def _tell(tells: Connection, said: Said) -> None:
    with contextlib.suppress(BrokenPipeError):  # it ends already, and asks no more
        tells.send(said)


@contextmanager
def _one_port(host: str, port: int) -> Iterator[int]:
    """The port that all share; where any will do, one that stays taken while none of them listens."""
    if port:
        yield port
        return
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as held:
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        try:
            held.bind((host, 0))
        except OSError as error:
            raise ConfigError("--host", host, f"an address of this machine ({error.strerror})") from None
        yield held.getsockname()[1]
