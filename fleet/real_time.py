"""The machine's own time for a fleet: emulated devices against a server that runs somewhere else."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ParamSpec, TypeVar

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from edge_client.bundle import RuntimeName
from edge_client.conditions import while_holding
from edge_client.http_transport import HttpTransport
from edge_client.identity import Identity
from edge_client.trainer import TrainingRequest
from fedtt.seams import SystemClock, Transport
from fleet.pool import Handle, Pool

__all__ = ["OnOneThread", "RealTime", "check_server", "http_connect"]

P = ParamSpec("P")
T = TypeVar("T")

_FIRST_ANSWER_S = 15.0


class RealTime(SystemClock):
    """A Timeline on a running asyncio loop; `failed` is the first error that no life has handled."""

    def __init__(self) -> None:
        self.failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._running: set[asyncio.Task[None]] = set()

    def start(self, coroutine: Coroutine[Any, Any, None]) -> _Started:
        task = asyncio.get_running_loop().create_task(coroutine)
        self._running.add(task)
        task.add_done_callback(self._ended)
        return _Started(task)

    def call_at(self, at: float, call: Callable[[], None]) -> None:
        asyncio.get_running_loop().call_later(max(0.0, at - self.now()), call)

    def held(
        self,
        work: Callable[[], Coroutine[Any, Any, T]],
        broken: Callable[[], Coroutine[Any, Any, str]],
        every_s: float,
    ) -> Awaitable[T]:
        return while_holding(work, broken, every_s)

    async def close(self) -> None:
        """Wait for what was stopped."""
        if self._running:
            await asyncio.wait(self._running)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._running.discard(task)
        if not task.cancelled() and (error := task.exception()) and not self.failed.done():
            self.failed.set_exception(error)


class _Started:
    def __init__(self, task: asyncio.Task[None]) -> None:
        self._task = task

    @property
    def over(self) -> bool:
        return self._task.done()

    def stop(self) -> None:
        self._task.cancel()

    def kill(self) -> None:
        """As near to a power cut as a task allows: the device is cancelled, and keeps its journal."""
        self._task.cancel()


class OnOneThread:
    """A Pool whose every call is made on one thread beside the loop, which no other may use meanwhile."""

    def __init__(self, inner: Pool) -> None:
        self._inner = inner
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="fedtt-pool")

    @property
    def runtime(self) -> RuntimeName:
        return self._inner.runtime

    def submit(self, request: TrainingRequest) -> Handle:
        return _Later(self._thread, self._inner, request)

    async def aside(self, function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """Wait for a handle's answer without holding up the loop."""
        return await asyncio.to_thread(function, *args, **kwargs)

    def close(self) -> None:
        self._thread.submit(self._inner.close)
        self._thread.shutdown()


class _Later:
    def __init__(self, thread: ThreadPoolExecutor, inner: Pool, request: TrainingRequest) -> None:
        self._thread, self._handle = thread, thread.submit(inner.submit, request)

    def result(self) -> Any:
        return self._thread.submit(lambda: self._handle.result().result()).result()

    def cancel(self) -> None:
        self._thread.submit(lambda: self._handle.result().cancel())


async def check_server(server: str, clock: RealTime) -> None:
    """Raise ConfigError, Unreachable or WireError where no aggregator answers at this address now.

    Devices themselves wait for a server, however long.
    """
    identity = Identity(Ed25519PrivateKey.generate())  # of a request that nobody asks to be signed
    transport = HttpTransport(server, identity, clock, timeout_s=_FIRST_ANSWER_S)
    try:
        await transport.look()
    finally:
        await transport.close()


def http_connect(server: str, clock: RealTime) -> Callable[[bytes], tuple[bytes, Transport]]:
    """A device's public key and its way to a server over HTTP, by its 32 secret bytes."""

    def connect(secret: bytes) -> tuple[bytes, Transport]:
        identity = Identity(Ed25519PrivateKey.from_private_bytes(secret))
        return identity.public_key, HttpTransport(server, identity, clock)

    return connect
