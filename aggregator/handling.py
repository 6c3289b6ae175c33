"""What both listeners share: bounded bodies, typed problems, and middleware that never leaks a traceback."""

from __future__ import annotations

import asyncio
import logging
import math
import re
import secrets
import time
from collections.abc import AsyncIterator, Callable
from typing import TypeVar

import msgspec
from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from aggregator.limits import Buckets, Rates, address_range
from aggregator.logs import name_request
from aggregator.problems import (
    internal,
    malformed,
    not_allowed,
    not_found,
    storage_failed,
    too_large,
    too_many,
)
from aggregator.service import Service
from fedtt.errors import FedttError, StorageError, WireError
from fedtt.messages import MEDIA_TYPE, STATUS, Code, Message, Problem, encode

__all__ = [
    "AUTHORITIES",
    "BODY_S",
    "KEYS",
    "RENDER",
    "SERVICE",
    "ProblemError",
    "answer",
    "body_pieces",
    "checked",
    "json_answer",
    "limited",
    "problems",
    "read_body",
    "read_message",
    "refuse",
]

Render = Callable[[Problem, int], web.Response]
SERVICE = web.AppKey("service", Service)
KEYS = web.AppKey("keys", Buckets)  #: what each device's key may still send
RENDER: web.AppKey[Render] = web.AppKey("render")  #: how the listener writes a Problem
BODY_S = web.AppKey("body_s", float)
AUTHORITIES = web.AppKey("authorities", frozenset)  #: for which requests may be signed; empty for any
_BUSY_RETRY_S = (1, 2, 3)  #: drawn, so that those who came together do not come back together
_CONTROL = re.compile("%(?:[01][0-9a-f]|7f)", re.IGNORECASE)  #: in a path or query as it came
_log = logging.getLogger("fedtt.aggregator")

M = TypeVar("M")


class ProblemError(FedttError):
    """Carries a Problem out of a handler to the middleware."""

    def __init__(self, problem: Problem, retry_after_s: float | None = None) -> None:
        self.problem, self.retry_after_s = problem, retry_after_s
        super().__init__(problem.detail)


def checked(value: M | Problem) -> M:
    """The value, or a Problem raised."""
    if isinstance(value, Problem):
        raise ProblemError(value)
    return value


def limited(rates: Rates, *, forwarded: bool) -> Middleware:
    """Middleware: no range of addresses asks for more than it may; nothing of a refused request is read."""
    buckets = Buckets(rates.addresses)

    @web.middleware
    async def middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
        # a proxy writes behind what it was sent, some on a line of their own
        told = request.headers.getall("X-Forwarded-For", []) if forwarded else []
        name = address_range(request.remote, told[-1] if told else None)
        if name is not None and (wait_s := buckets.take(name, time.monotonic())):
            raise ProblemError(too_many(name), wait_s)
        return await handler(request)

    return middleware


def _refuse_body(request: web.Request, limit_bytes: int) -> None:
    """Raise what is wrong with a body that nothing was read of."""
    if request.headers.get("Content-Encoding", "identity") != "identity":
        raise ProblemError(malformed("Content-Encoding is not taken: send the body as it is"))
    if (request.content_length or 0) > limit_bytes:
        raise ProblemError(too_large(limit_bytes))


async def body_pieces(request: web.Request, limit_bytes: int) -> AsyncIterator[bytes]:
    """The body as it comes: at most `limit_bytes` of it, and never decompressed; it may not rest for long."""
    _refuse_body(request, limit_bytes)
    received, allowed_s = 0, request.app[BODY_S]
    try:
        while True:
            async with asyncio.timeout(allowed_s):
                piece = await request.content.readany()
            if not piece:
                return
            received += len(piece)
            if received > limit_bytes:
                raise ProblemError(too_large(limit_bytes))
            yield piece
    except TimeoutError:
        raise ProblemError(malformed(f"no more of the body came within {allowed_s:g} s")) from None
    except (ConnectionError, web.RequestPayloadError):
        raise ProblemError(malformed(f"the body broke off after {received} bytes")) from None


async def read_body(request: web.Request, limit_bytes: int) -> bytes:
    """The whole body, which may take as long as the listener allows."""
    if request.content.is_eof() and request.content.exception() is None:  # all of it came with the head
        _refuse_body(request, limit_bytes)
        body = request.content.read_nowait()
        if len(body) > limit_bytes:
            raise ProblemError(too_large(limit_bytes))
        return body
    pieces, allowed_s = body_pieces(request, limit_bytes), request.app[BODY_S]
    try:
        async with asyncio.timeout(allowed_s):
            return b"".join([piece async for piece in pieces])
    except TimeoutError:
        raise ProblemError(malformed(f"the body did not arrive within {allowed_s:g} s")) from None


def read_message(body: bytes, read: Callable[[bytes], M]) -> M:
    """read: raises WireError for what is no such message."""
    try:
        return read(body)
    except WireError as error:
        raise ProblemError(malformed(str(error))) from None


def answer(message: Message, status: int = 200) -> web.Response:
    return web.Response(body=encode(message), content_type=MEDIA_TYPE, status=status)


def json_answer(value: object, status: int = 200) -> web.Response:
    return web.Response(body=msgspec.json.encode(value), content_type="application/json", status=status)


def refuse(
    app: web.Application, problem: Problem, status: int | None = None, retry_after_s: float | None = None
) -> web.Response:
    """Count a refusal, and answer with it in the listener's own format."""
    app[SERVICE].metrics.refused(problem.code)
    response = app[RENDER](problem, status or STATUS[problem.code])
    if problem.code in {Code.BUSY, Code.TOO_MANY}:
        wait_s = secrets.choice(_BUSY_RETRY_S) if retry_after_s is None else max(1, math.ceil(retry_after_s))
        response.headers["Retry-After"] = str(wait_s)
    return response


def problems(*, candid: bool) -> Middleware:
    """Middleware: every refusal is a Problem in the listener's own format.

    candid: whether whoever asks may read what is wrong with the server's own files.
    """

    @web.middleware
    async def middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
        name_request(request)
        try:
            if _CONTROL.search(request.raw_path):  # nothing here has such a name, PostgreSQL holds no NUL
                raise ProblemError(malformed("the path or its query has a control character"))
            return await handler(request)
        except ProblemError as error:
            return refuse(request.app, error.problem, retry_after_s=error.retry_after_s)
        except web.HTTPException as error:
            if error.status < 400:
                raise
            return _unrouted(request, error)
        except StorageError as error:
            _log.error("%s %s failed: %s", request.method, request.path, error)
            return refuse(request.app, storage_failed(str(error) if candid else ""))
        except FedttError as error:
            _log.warning("%s %s refused: %s", request.method, request.path, error)
            return refuse(request.app, malformed(str(error)))
        except Exception:
            _log.exception("%s %s failed", request.method, request.path)
            return refuse(request.app, internal())

    return middleware


def _unrouted(request: web.Request, error: web.HTTPException) -> web.Response:
    """No route takes this path, or none takes this method on it."""
    if not isinstance(error, web.HTTPMethodNotAllowed):
        return refuse(request.app, not_found(f"{request.method} {request.path[:100]}"), error.status)
    allowed = ", ".join(sorted(error.allowed_methods))
    problem = not_allowed(request.method, request.path[:100], allowed)
    response = refuse(request.app, problem, error.status)
    response.headers["Allow"] = allowed
    return response
