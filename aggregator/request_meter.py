"""Requests counted where aiohttp would write its access log: the one place that sees all of them."""

from __future__ import annotations

from aiohttp import web
from aiohttp.abc import AbstractAccessLogger

from aggregator.metrics import Metrics

__all__ = ["meter"]

_METHODS = frozenset({"DELETE", "GET", "HEAD", "POST", "PUT"})


def meter(metrics: Metrics, listener: str) -> type[AbstractAccessLogger]:
    """What aiohttp calls after each request to a listener."""

    class Meter(AbstractAccessLogger):
        def log(self, request: web.BaseRequest, response: web.StreamResponse, time: float) -> None:
            _answered(metrics, listener, request, response, time)

    return Meter


def _answered(
    metrics: Metrics,
    listener: str,
    request: web.BaseRequest,
    response: web.StreamResponse,
    seconds: float,
) -> None:
    """One request is over, understood or not; its answer has arrived or has broken off."""
    method = request.method if request.method in _METHODS else "other"
    route = "unmatched" if method == "other" else _template(request)
    metrics.requests.labels(listener, route, method, str(response.status)).inc()
    metrics.request_duration.labels(listener, route, method).observe(seconds)
    metrics.received.labels(listener, route).inc(request.content.total_bytes)
    whole = response.body_length > 0  # it counts the headers too, but only once the last byte has gone
    body_bytes = (response.content_length or 0) if whole and method != "HEAD" else 0
    metrics.sent.labels(listener, route).inc(body_bytes)


def _template(request: web.BaseRequest) -> str:
    """Its route without what stands in it, such as /v1/leases/{lease}."""
    resource = request.match_info.route.resource if isinstance(request, web.Request) else None
    return "unmatched" if resource is None else resource.canonical
