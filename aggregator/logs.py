"""The server's log: a line for each thing worth knowing, as text or as JSON, with the request it is about."""

from __future__ import annotations

import itertools
import logging
import re
import secrets
import sys
from contextvars import ContextVar

import msgspec
from aiohttp import web

__all__ = ["REQUEST_HEADER", "REQUEST_ID", "TRACE_ID", "name_request", "set_up_log", "tell_request"]

REQUEST_HEADER = "X-Request-ID"
REQUEST_ID: ContextVar[str] = ContextVar("request_id", default="")  #: of the request being answered
TRACE_ID: ContextVar[str] = ContextVar("trace_id", default="")  #: of its trace, where it has one
_NAME = web.RequestKey("request_id", str)
_PROCESS, _COUNT = secrets.token_hex(4), itertools.count(1)
_GIVEN = re.compile("[A-Za-z0-9._-]{1,64}")


def name_request(request: web.Request) -> None:
    """Take the name that a proxy gave the request, or give it one: it stands in the log and in the answer."""
    given = request.headers.get(REQUEST_HEADER, "")
    name = given if _GIVEN.fullmatch(given) else f"{_PROCESS}-{next(_COUNT)}"
    request[_NAME] = name  # the answer leaves from another task than the handler's
    REQUEST_ID.set(name)


async def tell_request(request: web.Request, response: web.StreamResponse) -> None:
    """Signal handler: whoever reports an answer can say which line of the log is about it."""
    if name := request.get(_NAME):
        response.headers[REQUEST_HEADER] = name


class _Text(logging.Formatter):
    """For people: the time, the process and the request where there are any, and what was said."""

    def __init__(self, process: int | None) -> None:
        super().__init__("%(message)s")
        self._process = "" if process is None else f"process {process}"

    def format(self, record: logging.LogRecord) -> str:
        trace = TRACE_ID.get()
        names = " ".join(filter(None, (self._process, REQUEST_ID.get(), trace and f"trace {trace}")))
        return f"{self.formatTime(record)} {f'[{names}] ' if names else ''}{super().format(record)}"


class _Json(logging.Formatter):
    """For programs: one object a line."""

    def __init__(self, process: int | None) -> None:
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        fields: dict[str, object] = {
            "at": record.created,
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if self._process is not None:
            fields["process"] = self._process
        if name := REQUEST_ID.get():
            fields["request"] = name
        if trace := TRACE_ID.get():
            fields["trace_id"] = trace
        if record.exc_info:
            fields["traceback"] = self.formatException(record.exc_info)
        return msgspec.json.encode(fields).decode()


def set_up_log(*, as_json: bool, process: int | None = None) -> None:
    """Write the log of this process to stderr. process: its number, where several write to one place."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Json(process) if as_json else _Text(process))
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    logging.getLogger("alembic").setLevel(logging.WARNING)
    logging.getLogger("aiohttp.server").setLevel(logging.CRITICAL)  # bytes that are no HTTP are no news
