"""One of several server processes, and all that follow in its place: started, kept running, ended."""

from __future__ import annotations

import asyncio
import logging
import multiprocessing
import signal
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnContext, SpawnProcess
from typing import Self

from msgspec import Struct
from msgspec.structs import replace

from aggregator.app import Listening
from aggregator.one_process import Settings, serve
from fedtt.errors import FedttError

__all__ = ["Member", "Said"]

_AGAIN_S = 1.0  #: between the death of a process and the start of the next
_SELDOM_S = 30.0  #: the longest that this becomes where it does not start
_SETTLED_S = 60.0  #: a process that dies later has not failed at once
_FAILURES = 5  #: at once, in a row, after which nobody waits for the next
_END_S = 20.0  #: beyond the drain, that a process may take to end
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


class Member:
    """One process and all that follow in its place."""

    def __init__(self, settings: Settings) -> None:
        """settings: with the number that stands for it in the log."""
        self._settings = settings
        self._context: SpawnContext = multiprocessing.get_context("spawn")
        self._process: SpawnProcess | None = None
        self._serves, self._failures = False, 0

    @property
    def is_hopeless(self) -> bool:
        """Whether it does not serve, and has failed at once again and again."""
        return not self._serves and self._failures >= _FAILURES

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
        self._serves = True
        return said

    async def keep_running(self, failed: Callable[[], None]) -> None:
        """Start another whenever it ends. failed: called each time that it is gone, and may raise."""
        while True:
            began = time.monotonic()
            process = self._process
            assert process is not None  # noqa: S101  # started
            await _readable(process.sentinel)
            process.join()
            self._serves = False
            self._failures = 1 if time.monotonic() - began > _SETTLED_S else self._failures + 1
            _log.error(
                "process %s (pid %s) ended with status %s: starting another",
                *(self._settings.process, process.pid, process.exitcode),
            )
            failed()
            await self._start_again(failed)

    async def _start_again(self, failed: Callable[[], None]) -> None:
        """As soon as it can be: the others go on meanwhile."""
        number, wait_s = self._settings.process, _AGAIN_S
        while True:
            await asyncio.sleep(wait_s)
            try:
                await self.start()
            except (FedttError, OSError) as error:
                self._failures += 1
                wait_s = min(2 * wait_s, _SELDOM_S)
                _log.error("process %s did not start, again in %g s: %s", number, wait_s, error)
                failed()
            else:
                assert self._process is not None  # noqa: S101
                _log.info("process %s is there again (pid %s)", number, self._process.pid)
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
            number = self._settings.process
            _log.error("process %s did not end by itself but with status %s", number, process.exitcode)
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
