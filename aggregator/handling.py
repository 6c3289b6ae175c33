"""What both listeners share: bounded bodies, typed problems, and middleware that never leaks a traceback."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import TypeVar

import msgspec
from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from aggregator.problems import malformed, not_found, too_large
from aggregator.service import Service
from fedtt.errors import FedttError, WireError
from fedtt.messages import MEDIA_TYPE, STATUS, Code, Message, Problem, decode, encode

__all__ = [
    "SERVICE",
    "ProblemError",
    "answer",
    "checked",
    "json_answer",
    "problems_as",
    "read_body",
    "read_message",
]

SERVICE = web.AppKey("service", Service)
BODY_TIMEOUT_S = 60.0
_BUSY_RETRY_S = 2
_log = logging.getLogger("fedtt.aggregator")

M = TypeVar("M")
Render = Callable[[Problem, int], web.Response]


class ProblemError(FedttError):
    """Carries a Problem out of a handler to the middleware."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        super().__init__(problem.detail)


def checked(value: M | Problem) -> M:
    """The value, or a Problem raised."""
    if isinstance(value, Problem):
        raise ProblemError(value)
    return value


async def read_body(request: web.Request, limit_bytes: int) -> bytes:
    """The body, of at most `limit_bytes`, within a minute, and never decompressed."""
    if request.headers.get("Content-Encoding", "identity") != "identity":
        raise ProblemError(malformed("Content-Encoding is not taken: send the body as it is"))
    if (request.content_length or 0) > limit_bytes:
        raise ProblemError(too_large(limit_bytes))
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            async for piece in request.content.iter_any():
                body += piece
                if len(body) > limit_bytes:
                    raise ProblemError(too_large(limit_bytes))
    except TimeoutError:
        raise ProblemError(malformed(f"the body did not arrive within {BODY_TIMEOUT_S:.0f} s")) from None
    return bytes(body)


def read_message(body: bytes, kind: type[M]) -> M:
    try:
        return decode(body, kind)
    except WireError as error:
        raise ProblemError(malformed(str(error))) from None


def answer(message: Message, status: int = 200) -> web.Response:
    return web.Response(body=encode(message), content_type=MEDIA_TYPE, status=status)


def json_answer(value: object, status: int = 200) -> web.Response:
    return web.Response(body=msgspec.json.encode(value), content_type="application/json", status=status)


def problems_as(render: Render) -> Middleware:
    """Middleware: every refusal is a Problem in the listener's own format."""

    def refuse(problem: Problem) -> web.Response:
        response = render(problem, STATUS[problem.code])
        if problem.code is Code.BUSY:
            response.headers["Retry-After"] = str(_BUSY_RETRY_S)
        return response

    @web.middleware
    async def middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
        try:
            return await handler(request)
        except ProblemError as error:
            return refuse(error.problem)
        except web.HTTPException as error:
            if error.status < 400:
                raise
            problem = not_found(f"{request.method} {request.path[:100]}")
            return render(problem, error.status)
        except FedttError as error:
            _log.warning("%s %s refused: %s", request.method, request.path, error)
            return refuse(malformed(str(error)))
        except Exception:
            _log.exception("%s %s failed", request.method, request.path)
            detail = "the server met a bug; nothing was changed"
            return refuse(
                Problem(code=Code.INTERNAL, detail=detail, remedy="report it with the server's log")
            )

    return middleware
