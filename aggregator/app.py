"""One server process: two listeners, the round keeper, and a clean start and stop."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

from aiohttp import web
from aiohttp.abc import AbstractAccessLogger
from aiohttp.typedefs import Middleware
from msgspec import Struct
from msgspec.structs import replace

from aggregator.admin_routes import add_admin_routes, admin_problem, require_token
from aggregator.connections import ConnectionLimits, Connections
from aggregator.data_directory import server_directory
from aggregator.device_routes import add_device_routes
from aggregator.enrolment import no_standing_token, standing_token
from aggregator.handling import AUTHORITIES, BODY_S, KEYS, RENDER, SERVICE, answer, limited, problems
from aggregator.limits import Buckets, Rates
from aggregator.logs import tell_request
from aggregator.request_meter import meter
from aggregator.server_key import ServerKey
from aggregator.service import Service
from aggregator.tls import server_tls
from aggregator.token_files import secret_file, token_sha256
from aggregator.traced_requests import traced
from aggregator.tracing import UNTRACED, TracedStore, Tracer
from aggregator.unread import keep_little_unsent
from aggregator.unreadable import Protocol
from fedtt.errors import ConfigError
from fedtt.seams import SystemClock
from storage.backend import is_shared
from storage.blobs import open_blobs
from storage.sql import SqlStore
from storage.store import Store

__all__ = ["Listening", "ServerConfig", "admin_app", "device_app", "not_listening", "serving", "url_of"]

_log = logging.getLogger("fedtt.aggregator")
_HEADER_LIMIT_BYTES = 4096
_BACKLOG = 1024
BODY_LIMIT_S = 60.0
_HANDSHAKE_S = 10.0  #: for TLS
_LINGER_S = 2.0  #: for which the rest of a refused body is read, so that its sender sees the refusal


class ServerConfig(Struct, frozen=True, kw_only=True):
    """How one process is set up; everything else lies in its data directory."""

    data: Path
    host: str = "127.0.0.1"
    port: int = 8440  #: for devices; 0 picks a free one
    admin_host: str = "127.0.0.1"
    admin_port: int = 8441  #: for people; 0 picks a free one
    reuse_port: bool = False  #: let other servers listen on the devices' port too
    database: str | None = None  #: SQLAlchemy URL; None for fedtt.db in the data directory
    blobs: str | None = None  #: directory or s3://BUCKET/PREFIX; None for blobs in the data directory
    idle_s: float = 30.0  #: after which a connection without a whole request is closed
    body_s: float = BODY_LIMIT_S  #: for a request's body to arrive, and for more of an answer to be taken
    rates: Rates = Rates()  #: of requests to the devices' listener
    connections: ConnectionLimits = ConnectionLimits()  #: to the devices' listener
    authorities: tuple[str, ...] = ()  #: HOST[:PORT]s for which devices may sign; none for any
    forwarded: bool = False  #: whether a proxy in front says in X-Forwarded-For whom it stands for
    tls_cert: Path | None = None  #: chain in PEM, for both listeners; None leaves TLS to a proxy
    tls_key: Path | None = None  #: its key in PEM
    standing_token: bool = True  #: whether a file holds a token for any number of devices
    server_key: Path | None = None  #: signs answers to check-ins, for devices that trust its release key


class Listening(Struct, frozen=True, kw_only=True):
    """Where a started server can be reached."""

    url: str
    admin_url: str  #: the dashboard is its root
    admin_token: str
    enrolment_token: str  #: the standing one; empty where there is none
    service: Service


def device_app(
    service: Service,
    *,
    body_s: float = BODY_LIMIT_S,
    rates: Rates = Rates(),  # noqa: B008  # a frozen value
    forwarded: bool = False,
    authorities: tuple[str, ...] = (),
) -> web.Application:
    limit = limited(rates, forwarded=forwarded)
    app = web.Application(middlewares=[*_spans(service, joined=forwarded), problems(candid=False), limit])
    app.on_response_prepare.append(tell_request)
    app[SERVICE], app[BODY_S], app[KEYS] = service, body_s, Buckets(rates.key)
    app[AUTHORITIES] = frozenset(name.lower() for name in authorities)
    app[RENDER] = answer
    add_device_routes(app)
    return app


def admin_app(service: Service, admin_token: str, *, body_s: float = BODY_LIMIT_S) -> web.Application:
    secret = require_token(token_sha256(admin_token))
    app = web.Application(middlewares=[*_spans(service, joined=True), problems(candid=True), secret])
    app.on_response_prepare.append(tell_request)
    app[SERVICE], app[BODY_S], app[RENDER] = service, body_s, admin_problem
    add_admin_routes(app)
    return app


def _spans(service: Service, *, joined: bool) -> list[Middleware]:
    return [] if service.tracer is UNTRACED else [traced(service.tracer, joined=joined)]


@asynccontextmanager
async def serving(config: ServerConfig, tracer: Tracer = UNTRACED) -> AsyncIterator[Listening]:
    """Open the data directory, listen, keep rounds moving; on leaving, finish what is queued.

    Raises StorageError where the directory or database cannot be used, ConfigError where a port is taken.
    """
    async with contextlib.AsyncExitStack() as stack:
        tls = server_tls(config.tls_cert, config.tls_key)
        database = config.database or config.data / "fedtt.db"
        alone = not (config.reuse_port or is_shared(database))
        stack.enter_context(server_directory(config.data, alone=alone))
        store: Store = SqlStore.open(database, alone=alone)
        stack.callback(store.close)
        if tracer is not UNTRACED:
            store = TracedStore(store, tracer)
        blobs = open_blobs(config.blobs or config.data / "blobs")
        service = Service(store, blobs, SystemClock(), tracer=tracer)
        stack.callback(service.close)
        if config.server_key is not None:
            service.server_key = ServerKey.read(config.server_key, service.clock.now())
        service.writer.start()
        stack.push_async_callback(service.writer.stop)
        admin_token = secret_file(config.data / "admin-token")
        token_file, enrolment_token = config.data / "enrolment-token", ""
        if config.standing_token:
            enrolment_token = await standing_token(service, token_file)
        else:
            await no_standing_token(service, token_file)
        devices = device_app(
            service,
            body_s=config.body_s,
            rates=config.rates,
            forwarded=config.forwarded,
            authorities=config.authorities,
        )
        people = admin_app(service, admin_token, body_s=config.body_s)
        listen = partial(_listen, stack, idle_s=config.idle_s, tls=tls)
        counted = partial(meter, service.metrics)
        limits = config.connections
        if config.forwarded:  # all come from the proxy
            limits = replace(limits, addresses=None)
        kept = partial(
            Connections,
            refused=service.metrics.connection_refused,
            handshake_s=None if tls is None else min(config.idle_s, _HANDSHAKE_S),
            idle=service.metrics.connection_idle,
            failed=service.metrics.handshakes_failed.inc,
        )
        url = await listen(
            devices,
            config.host,
            config.port,
            counted("devices"),
            kept(limits),
            reuse_port=config.reuse_port,
        )
        admin_url = await listen(
            people,
            config.admin_host,
            config.admin_port,
            counted("admin"),
            kept(ConnectionLimits(addresses=None)),
            option="admin-",
        )
        keeper = asyncio.create_task(service.keeper.run())
        stack.push_async_callback(_cancel, keeper)
        yield Listening(
            url=url,
            admin_url=admin_url,
            admin_token=admin_token,
            enrolment_token=enrolment_token,
            service=service,
        )


async def _listen(
    stack: contextlib.AsyncExitStack,
    app: web.Application,
    host: str,
    port: int,
    meter: type[AbstractAccessLogger],
    connections: Connections,
    *,
    idle_s: float,
    tls: ssl.SSLContext | None,
    option: str = "",
    reuse_port: bool = False,
) -> str:
    """Serve an application until the stack is left; `option` begins the names of its two options."""
    runner = web.AppRunner(app, shutdown_timeout=5.0)
    await runner.setup()
    stack.push_async_callback(runner.cleanup)
    assert runner.server is not None  # noqa: S101  # once it is set up
    protocol = partial(
        Protocol,
        app,
        runner.server,
        connections,
        access_log=_log,  # nothing is written to it: the meter counts and keeps no line
        access_log_class=meter,
        keepalive_timeout=idle_s,
        lingering_time=_LINGER_S,
        auto_decompress=False,  # a few bytes could unpack to gigabytes
        max_line_size=_HEADER_LIMIT_BYTES,
        max_field_size=_HEADER_LIMIT_BYTES,
    )
    create = partial(
        asyncio.get_running_loop().create_server,
        protocol,
        backlog=_BACKLOG,
        ssl=tls,
        ssl_handshake_timeout=connections.handshake_s,
        ssl_shutdown_timeout=None if tls is None else _LINGER_S,  # else a silent peer is kept half a minute
    )
    try:
        server = await create(host, port, reuse_port=reuse_port or None, start_serving=False)
        stack.callback(server.close)
        bound = server.sockets[0].getsockname()[1]
        for listener in connections.listen(server.sockets):
            keep_little_unsent(listener)
            stack.callback((await create(sock=listener)).close)
        server.close()
    except OSError as error:
        raise not_listening(error, host, port, option) from None
    return url_of(host, bound, tls=tls is not None)


def url_of(host: str, port: int, *, tls: bool = False) -> str:
    scheme = "https" if tls else "http"
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"


def not_listening(error: OSError, host: str, port: int, option: str = "") -> ConfigError:
    """Why an address cannot be listened on; `option` begins the names of its two options."""
    if error.errno == errno.EADDRINUSE:
        allowed = "a free one: stop the program that uses it, or choose another"
        return ConfigError(f"--{option}port", port, allowed, host)
    if error.errno == errno.EACCES:
        return ConfigError(f"--{option}port", port, "one that this user may open, such as 8440", host)
    allowed = f"an address of this machine ({error.strerror or error})"
    return ConfigError(f"--{option}host", host, allowed)


async def _cancel(task: asyncio.Task[None]) -> None:
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
