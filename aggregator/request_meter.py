"""Requests counted where aiohttp would write its access log: the one place that sees all of them."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

from aiohttp import web
from aiohttp.abc import AbstractAccessLogger
from prometheus_client import Counter, Histogram

from aggregator.metrics import Metrics

__all__ = ["meter"]

_METHODS = frozenset({"DELETE", "GET", "HEAD", "POST", "PUT"})


class _Series(NamedTuple):
    """What one kind of request is counted in: looking them up by their labels costs more than counting."""

    requests: Counter
    duration: Histogram
    received: Counter
    sent: Counter


def meter(metrics: Metrics, listener: str) -> type[AbstractAccessLogger]:
    """What aiohttp calls after each request to a listener."""

    @lru_cache(maxsize=1024)
    def series(route: str, method: str, status: int) -> _Series:
        return _Series(
            metrics.requests.labels(listener, route, method, str(status)),
            metrics.request_duration.labels(listener, route, method),
            metrics.received.labels(listener, route),
            metrics.sent.labels(listener, route),
        )

    class Meter(AbstractAccessLogger):
        def log(self, request: web.BaseRequest, response: web.StreamResponse, time: float) -> None:
            """One request is over, understood or not; its answer has arrived or has broken off."""
            method = request.method if request.method in _METHODS else "other"
            route = "unmatched" if method == "other" else _template(request)
            counted = series(route, method, response.status)
            counted.requests.inc()
            counted.duration.observe(time)
            counted.received.inc(request.content.total_bytes)
            whole = response.body_length > 0  # headers count there too, but only once the last byte has gone
            counted.sent.inc((response.content_length or 0) if whole and method != "HEAD" else 0)

    return Meter


def _template(request: web.BaseRequest) -> str:
    """Its route without what stands in it, such as /v1/leases/{lease}."""
    resource = request.match_info.route.resource if isinstance(request, web.Request) else None
    return "unmatched" if resource is None else resource.canonical
