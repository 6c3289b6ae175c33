"""Traces: spans of requests, transactions, folds and releases, where they are asked for.

Needed here is a `Tracer` alone. One does nothing; the other is in `aggregator/open_telemetry.py`, which is
imported only where traces are asked for.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Protocol

from fedtt.errors import ConfigError
from storage.store import Store, Transaction

__all__ = ["UNTRACED", "Span", "TracedStore", "Tracer", "open_tracer"]

_ASKED_FOR = ("OTEL_TRACES_EXPORTER", "OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")


class Span(Protocol):
    """One timed piece of work."""

    trace_id: str  #: 32 hex digits; "" where nothing is recorded

    def set(self, attributes: Mapping[str, str | int]) -> None: ...

    def failed(self, why: str) -> None: ...


class Tracer(Protocol):
    """Opens spans; one opened within another, also on a thread that it started, is its child."""

    def span(
        self, name: str, *, server: bool = False, caller: Mapping[str, str] | None = None
    ) -> AbstractContextManager[Span]:
        """server: it answers a request from outside. caller: whose headers say of which trace it is part."""
        ...

    def close(self) -> None:
        """Send what waits to be sent."""
        ...


class _NoSpan:
    trace_id = ""

    def set(self, attributes: Mapping[str, str | int]) -> None: ...

    def failed(self, why: str) -> None: ...


class _Untraced:
    _NOTHING: AbstractContextManager[Span] = nullcontext(_NoSpan())

    def span(
        self, name: str, *, server: bool = False, caller: Mapping[str, str] | None = None
    ) -> AbstractContextManager[Span]:
        return self._NOTHING

    def close(self) -> None: ...


UNTRACED: Tracer = _Untraced()


def open_tracer(*, asked_for: bool = False) -> Tracer:
    """As OpenTelemetry's environment variables say; they, or `asked_for`, turn it on.

    Raises ConfigError where it is asked for and not installed, or asked for in a way that is not supported.
    """
    named = [name for name in _ASKED_FOR if os.environ.get(name, "none") not in {"", "none"}]
    if os.environ.get("OTEL_SDK_DISABLED", "").lower() == "true" or not (asked_for or named):
        return UNTRACED
    if os.environ.get("OTEL_TRACES_EXPORTER") == "none":
        return UNTRACED
    try:
        from aggregator.open_telemetry import OpenTelemetry
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "opentelemetry":
            raise
        field = "--traces" if asked_for else named[0]
        raise ConfigError(
            field,
            "on" if asked_for else os.environ[field],
            "traces only where OpenTelemetry is installed: pip install 'fedtt[otel]'",
        ) from None
    return OpenTelemetry.from_environment()


class TracedStore:
    """A store whose transactions are spans."""

    def __init__(self, store: Store, tracer: Tracer) -> None:
        self._store, self._tracer = store, tracer

    @property
    def is_shared(self) -> bool:
        return self._store.is_shared

    @contextmanager
    def transaction(self) -> Iterator[Transaction]:
        with self._tracer.span("store.transaction") as span, self._store.transaction() as tx:
            yield tx
            span.set({f"fedtt.updates.{state.value}": count for state, count in tx.moved.items()})

    @contextmanager
    def reading(self) -> Iterator[Transaction]:
        with self._tracer.span("store.reading"), self._store.reading() as tx:
            yield tx

    def wipe(self) -> bool:
        return self._store.wipe()

    def maintain(self) -> bool:
        return self._store.maintain()

    def close(self) -> None:
        self._store.close()
