"""A server process under test: killed, started again on the same ports, run under a tracer."""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec

from aggregator.admin_client import AdminClient
from benchmarks.bundles import bundle_of
from benchmarks.with_parent import WITH_PARENT

__all__ = ["TASK", "ServerProcess", "on_one_port", "task_text"]

TASK = "faults"
_START_S = 60.0
_SUMMED_S = 30.0
_ASK_AGAIN_S = 30.0  #: after which a server that still runs is told once more to end


def task_text(quantise: str = "fp32", *, more: str = "", **rounds: float) -> str:
    """A task file; its rounds fold once all of their cohort have answered unless `rounds` says otherwise.

    more: lines at its end, of the codec's table first.
    """
    settings = {"count": 1_000_000, "cohort": 10, "deadline_s": 600, "retry_s": 0.1} | rounds
    lines = "\n".join(f"{key} = {value}" for key, value in settings.items())
    return (
        f'name = "{TASK}"\n[rounds]\n{lines}\n[method]\nname = "fedavg"\n'
        f'[codec]\nquantise = "{quantise}"\n{more}'
    )


class ServerProcess:
    """`fedtt serve` on a data directory and two ports that stay the same; its log grows in `server.log`.

    It ends with this process, also where that is killed: a wrapper with it, and the server with its wrapper.
    """

    def __init__(self, data: Path, *wrapper: str, options: Sequence[str] = ()) -> None:
        """wrapper: a command to run it under, such as strace; options: more of `fedtt serve`."""
        self.data, self._wrapper, self._options = data, wrapper, options
        self.port, self.admin_port = _free_ports()
        self.url = f"http://127.0.0.1:{self.port}"
        self.process: asyncio.subprocess.Process | None = None
        self.token = ""

    async def start(self, *, wait: bool = True) -> float:
        """Start it and, with `wait`, let it listen; returns how many seconds that took.

        Raises RuntimeError where it ends before.
        """
        ports = ("--port", str(self.port), "--admin-port", str(self.admin_port))
        arguments = ("-m", "fedtt", "serve", "--json", "--data", str(self.data), *ports, *self._options)
        wrapper = (*WITH_PARENT, *self._wrapper) if self._wrapper else ()
        started = time.perf_counter()
        self.data.parent.mkdir(parents=True, exist_ok=True)
        with (self.data.parent / "server.log").open("ab") as log:
            self.process = await asyncio.create_subprocess_exec(
                *(*wrapper, *WITH_PARENT, sys.executable, *arguments),
                stdout=asyncio.subprocess.PIPE,
                stderr=log,
                start_new_session=True,
            )
        if wait:
            await self.listening()
        return time.perf_counter() - started

    async def listening(self) -> None:
        assert self.process is not None
        assert self.process.stdout is not None
        async with asyncio.timeout(_START_S):
            line = await self.process.stdout.readline()
        if not line:
            await self.process.wait()
            raise RuntimeError(f"the server did not start: see {self.data.parent / 'server.log'}")
        self.token = msgspec.json.decode(line)["enrolment_token"]

    async def kill(self) -> None:
        """kill -9, the tracer and all."""
        await self._end(signal.SIGKILL)

    async def stop(self) -> None:
        """Ask it to end (SIGTERM) and wait until it has."""
        await self._end(signal.SIGTERM)

    async def _end(self, how: signal.Signals) -> None:
        while self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, how)
            with contextlib.suppress(
                TimeoutError
            ):  # the call that tells its loop of the signal may have failed
                async with asyncio.timeout(_ASK_AGAIN_S):
                    await self.process.wait()
                    self.process = None

    @property
    def is_running(self) -> bool:
        return self.process is not None and self.process.returncode is None

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    def resident_bytes(self) -> int:
        """Of the process itself."""
        pages = int(Path(f"/proc/{self.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")

    def anonymous_bytes(self) -> int:
        """The part of it that is no mapped file: of those the kernel takes pages and brings them back."""
        status = Path(f"/proc/{self.pid}/status").read_text()
        line = next(line for line in status.splitlines() if line.startswith("RssAnon"))
        return 1024 * int(line.split()[1])

    def peak_bytes(self) -> int:
        """The most it ever had resident."""
        status = Path(f"/proc/{self.pid}/status").read_text()
        line = next(line for line in status.splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024

    def descriptors(self) -> tuple[int, int]:
        """Files it has open, pipes and the like among them; and sockets."""
        names = []
        for descriptor in Path(f"/proc/{self.pid}/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):  # closed meanwhile
                names.append(str(descriptor.readlink()))
        sockets = sum(name.startswith("socket:") for name in names)
        return len(names) - sockets, sockets

    def admin(self) -> AdminClient:
        token = (self.data / "admin-token").read_text().strip()
        return AdminClient(f"http://127.0.0.1:{self.admin_port}", token)

    async def open_task(self, text: str, bundle: Path | int) -> None:
        """Register a bundle, or one of so many trained numbers that nobody can train, and open the task."""
        directory = self.data.parent / "bundle" if isinstance(bundle, int) else bundle
        if isinstance(bundle, int):
            bundle_of(directory, bundle)
        async with self.admin() as admin:
            await admin.create_task(text, await admin.send_bundle(directory))

    async def task(self, below: str = "", method: str = "GET") -> Any:
        async with self.admin() as admin:
            return await admin.task(TASK, below, method)

    async def end_task(self) -> None:
        """Stop the task, and wait until the sum that was under way is published: each update has its end."""
        await self.task("/stop", "POST")
        async with asyncio.timeout(_SUMMED_S):
            while any(round_["state"] == "folding" for round_ in await self.task("/rounds?limit=1")):
                await asyncio.sleep(0.02)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[ServerProcess]:
        """Started, and gone when the block is left, whatever happens in it."""
        try:
            await self.start()
            yield self
        finally:
            await self.kill()


def on_one_port(data: Path, count: int, *options: str) -> list[ServerProcess]:
    """Servers on one directory and port; the kernel gives each new connection to one of them."""
    servers = [ServerProcess(data, options=(*options, "--reuse-port")) for _ in range(count)]
    for server in servers:
        server.port, server.url = servers[0].port, servers[0].url
    return servers


def _free_ports() -> tuple[int, int]:
    """Two that are free, below those that connections come from.

    A client that asks again and again for a port in that range while nobody listens there may be given the
    same port to ask from: it then talks to itself, and the server cannot have its port back.
    """
    first = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    found: list[int] = []
    while len(found) < 2:
        port = secrets.randbelow(first - 1024) + 1024
        with socket.socket() as tried, contextlib.suppress(OSError):
            tried.bind(("127.0.0.1", port))
            found.append(port)
    return found[0], found[1]
