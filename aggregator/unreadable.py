"""Connections: requests that are no HTTP are refused like all others, and those that wait for ever closed."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import Any

from aiohttp import web, web_protocol
from aiohttp.http_exceptions import BadStatusLine, HttpProcessingError, LineTooLong
from aiohttp.streams import EMPTY_PAYLOAD

from aggregator.connections import Connections
from aggregator.handling import BODY_S, SERVICE, refuse
from aggregator.problems import malformed
from aggregator.unread import Unread, hold_little

__all__ = ["Protocol"]

_HEAD_BYTES = 1 << 14  #: of all fields; what comes together with a head's end is not counted
web_protocol.MAX_MSG_QUEUE_SIZE = 2  # requests read ahead, by any server here; 32 have 0.7 MB of fields


class _HeadTooLong(HttpProcessingError):
    """All fields together."""


class Protocol(web.RequestHandler):
    """One connection. What aiohttp says of a request that it cannot read echoes it, and logs a traceback."""

    __slots__ = ("_app", "_body", "_connections", "_head_bytes", "_unread")

    def __init__(
        self, app: web.Application, server: web.Server, connections: Connections, **settings: Any
    ) -> None:
        super().__init__(server, loop=asyncio.get_running_loop(), **settings)
        self._app, self._connections = app, connections
        self._head_bytes, self._body = 0, EMPTY_PAYLOAD  #: of what is not whole yet; of the newest that is

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Over TLS, once hands are shaken."""
        super().connection_made(transport)
        connection = transport.get_extra_info("socket")
        self._connections.begun(connection.fileno())
        hold_little(transport)
        late = partial(self._app[SERVICE].metrics.connection_idle, "reading")
        self._unread = Unread(connection, self._app[BODY_S], late)

    def data_received(self, data: bytes) -> None:
        """aiohttp bounds each field and their number, but not their sum, which could be half a megabyte."""
        count, is_head = self._request_count, self._body.is_eof()
        super().data_received(data)
        if self._request_count != count:
            self._head_bytes, self._body = 0, self._messages[-1][1]
        elif is_head:
            self._head_bytes += len(data)
            if self._head_bytes > _HEAD_BYTES:
                self._refuse_head()

    def _refuse_head(self) -> None:
        """As what the parser refuses; what came before is answered first."""
        self._head_bytes = 0
        self._request_count += 1
        told = web_protocol._ErrInfo(status=400, exc=_HeadTooLong(), message="")
        self._messages.append((told, EMPTY_PAYLOAD))
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        if not isinstance(exc, HttpProcessingError):
            return super().handle_error(request, status, exc, message)
        exc.with_traceback(None)
        response = refuse(self._app, malformed(self._wrong(exc)), status)
        response.force_close()
        return response

    def _wrong(self, error: HttpProcessingError) -> str:
        if isinstance(error, LineTooLong):
            return f"a line or field of the request's head is longer than {self.max_field_size} bytes"
        if isinstance(error, _HeadTooLong):
            return f"the request's head is longer than {_HEAD_BYTES} bytes"
        if isinstance(error, BadStatusLine):
            return "the request does not begin with a method, a path and a version of HTTP"
        return f"the request's head is no valid HTTP, or has more than {self.max_headers} fields"

    def _process_keepalive(self) -> None:
        """Its timer, which closes a connection that has waited too long for a whole request.

        One that has brought a request before, and nothing of another, only rested, as a proxy's do.
        """
        closed_before = self._force_close
        super()._process_keepalive()
        if self._force_close and not closed_before and (not self._request_count or self._head_has_begun()):
            self._app[SERVICE].metrics.connection_idle("request")

    def _head_has_begun(self) -> bool:
        """What the parser makes of an end that comes now; nothing else shows what it holds."""
        try:
            return self._parser is not None and self._parser.feed_eof() is not None
        except Exception:  # it may end anywhere, even within the method
            return True

    def connection_lost(self, exc: BaseException | None) -> None:
        """Let go of what was read: each piece behind the first error has failed too, and its error's frames
        hold it in a cycle that is collected seldom (0.5 MB for each head of 1 MB)."""
        super().connection_lost(exc)
        self._unread.stop()
        for message, _ in self._messages:
            if error := getattr(message, "exc", None):
                error.with_traceback(None)

    async def finish_response(
        self, request: web.BaseRequest, resp: web.StreamResponse, start_time: float | None
    ) -> tuple[web.StreamResponse, bool]:
        if isinstance(resp, web.HTTPExpectationFailed):  # raised before any middleware
            resp = refuse(self._app, malformed("Expect may ask for 100-continue alone"))
        self._unread.watch()
        try:
            return await super().finish_response(request, resp, start_time)
        finally:
            self._unread.answering = False
