"""One server process: two listeners, the round keeper, and a clean start and stop."""

from __future__ import annotations

import asyncio
import contextlib
import errno
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from aiohttp import web
from msgspec import Struct
from storage.blobs import FileBlobs

from aggregator.admin_routes import add_admin_routes, admin_problem, require_token
from aggregator.auth import token_sha256
from aggregator.device_routes import add_device_routes
from aggregator.handling import SERVICE, answer, problems_as
from aggregator.service import Service
from aggregator.token_files import secret_file
from fedtt.errors import ConfigError, StorageError
from fedtt.seams import SystemClock
from storage.records import Token
from storage.sql import SqlStore

__all__ = ["Listening", "ServerConfig", "admin_app", "device_app", "serving"]

_HEADER_LIMIT_BYTES = 4096
_KEEPALIVE_S = 30.0
_BACKLOG = 1024


class ServerConfig(Struct, frozen=True, kw_only=True):
    """How one process is set up; everything else lies in its data directory."""

    data: Path
    host: str = "127.0.0.1"
    port: int = 8440  #: for devices; 0 picks a free one
    admin_host: str = "127.0.0.1"
    admin_port: int = 8441  #: for people; 0 picks a free one
    database: str | None = None  #: SQLAlchemy URL; None for fedtt.db in the data directory


class Listening(Struct, frozen=True, kw_only=True):
    """Where a started server can be reached."""

    url: str
    admin_url: str
    admin_token: str
    enrolment_token: str
    service: Service


def device_app(service: Service) -> web.Application:
    app = web.Application(middlewares=[problems_as(answer)])
    app[SERVICE] = service
    add_device_routes(app)
    return app


def admin_app(service: Service, admin_token: str) -> web.Application:
    app = web.Application(middlewares=[problems_as(admin_problem), require_token(token_sha256(admin_token))])
    app[SERVICE] = service
    add_admin_routes(app)
    return app


@asynccontextmanager
async def serving(config: ServerConfig) -> AsyncIterator[Listening]:
    """Open the data directory, listen, keep rounds moving; on leaving, finish what is queued.

    Raises StorageError where the directory or database cannot be used, ConfigError where a port is taken.
    """
    _make_directory(config.data)
    store = SqlStore.open(config.database or config.data / "fedtt.db")
    async with contextlib.AsyncExitStack() as stack:
        stack.callback(store.close)
        service = Service(store, FileBlobs(config.data / "blobs"), SystemClock())
        service.writer.start()
        stack.push_async_callback(service.writer.stop)
        admin_token = secret_file(config.data / "admin-token")
        enrolment_token = secret_file(config.data / "enrolment-token")
        token = Token(sha256=token_sha256(enrolment_token), uses_left=None, expires_at=None)
        await service.writer.run(lambda tx: tx.put_token(token))
        url = await _listen(stack, device_app(service), config.host, config.port, "--port")
        admin_url = await _listen(
            stack, admin_app(service, admin_token), config.admin_host, config.admin_port, "--admin-port"
        )
        keeper = asyncio.create_task(service.run())
        stack.push_async_callback(_cancel, keeper)
        yield Listening(
            url=url,
            admin_url=admin_url,
            admin_token=admin_token,
            enrolment_token=enrolment_token,
            service=service,
        )


def _make_directory(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise StorageError(
            f"the data directory {path} cannot be made: {error.strerror}; choose one with --data"
        ) from None


async def _listen(
    stack: contextlib.AsyncExitStack, app: web.Application, host: str, port: int, option: str
) -> str:
    runner = web.AppRunner(
        app,
        access_log=None,
        keepalive_timeout=_KEEPALIVE_S,
        max_line_size=_HEADER_LIMIT_BYTES,
        max_field_size=_HEADER_LIMIT_BYTES,
    )
    await runner.setup()
    stack.push_async_callback(runner.cleanup)
    site = web.TCPSite(runner, host, port, backlog=_BACKLOG, shutdown_timeout=5.0)
    try:
        await site.start()
    except OSError as error:
        taken = error.errno == errno.EADDRINUSE
        allowed = "a free one: stop the program that uses it, or choose another" if taken else str(error)
        raise ConfigError(option, port, allowed, host) from None
    bound = runner.addresses[0][1]
    return f"http://{host}:{bound}"


async def _cancel(task: asyncio.Task[None]) -> None:
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
