"""Spans of requests; beside `aggregator.tracing`, so that a server in process needs no HTTP library."""

from __future__ import annotations

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from aggregator.logs import REQUEST_ID, TRACE_ID
from aggregator.tracing import Tracer

__all__ = ["traced"]


def traced(tracer: Tracer, *, joined: bool) -> Middleware:
    """Middleware: a span for each request, which its log lines and its answer name.

    joined: whether a caller may say of which trace a request is part. Strangers may not: they would decide
    what is recorded.
    """

    @web.middleware
    async def middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
        resource = request.match_info.route.resource
        route = resource.canonical if resource else ""
        caller = request.headers if joined else None
        with tracer.span(f"{request.method} {route}".rstrip(), server=True, caller=caller) as span:
            TRACE_ID.set(span.trace_id)
            answer = await handler(request)
            span.set(
                {
                    "http.request.method": request.method,
                    "http.route": route,
                    "http.response.status_code": answer.status,
                    "fedtt.request_id": REQUEST_ID.get(),
                }
            )
            if answer.status >= 500:
                span.failed(f"answered {answer.status}")
            return answer

    return middleware
