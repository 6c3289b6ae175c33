"""Spans by OpenTelemetry's SDK, sent as its environment variables say."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from opentelemetry import trace
from opentelemetry.propagate import extract
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import (
    BatchSpanProcessor,
    ConsoleSpanExporter,
    SpanExporter,
)

from aggregator.tracing import Span
from fedtt.errors import ConfigError

__all__ = ["OpenTelemetry"]

_PROTOCOLS = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")


class _Span:
    def __init__(self, span: trace.Span) -> None:
        self._span = span
        context = span.get_span_context()
        self.trace_id = trace.format_trace_id(context.trace_id) if context.is_valid else ""

    def set(self, attributes: Mapping[str, str | int]) -> None:
        self._span.set_attributes(attributes)

    def failed(self, why: str) -> None:
        self._span.set_status(trace.StatusCode.ERROR, why)


class OpenTelemetry:
    """A tracer of its own: no global provider is set, so an app that hosts a server keeps its own."""

    def __init__(self, processor: SpanProcessor) -> None:
        name = os.environ.get("OTEL_SERVICE_NAME", "fedtt")
        self._provider = TracerProvider(
            resource=Resource.create({"service.name": name}), shutdown_on_exit=False
        )
        self._provider.add_span_processor(processor)
        self._tracer = self._provider.get_tracer("fedtt.aggregator")

    @classmethod
    def from_environment(cls) -> OpenTelemetry:
        """Raises ConfigError for an exporter or a protocol that is not supported."""
        return cls(BatchSpanProcessor(_exporter()))

    @contextmanager
    def span(
        self, name: str, *, server: bool = False, caller: Mapping[str, str] | None = None
    ) -> Iterator[Span]:
        kind = trace.SpanKind.SERVER if server else trace.SpanKind.INTERNAL
        context = extract(caller) if caller is not None else None
        with self._tracer.start_as_current_span(name, context=context, kind=kind) as span:
            yield _Span(span)

    def close(self) -> None:
        self._provider.shutdown()


def _exporter() -> SpanExporter:
    wanted = os.environ.get("OTEL_TRACES_EXPORTER") or "otlp"
    if wanted == "console":
        return ConsoleSpanExporter()
    if wanted != "otlp":
        raise ConfigError("OTEL_TRACES_EXPORTER", wanted, "otlp, console or none")
    for name in _PROTOCOLS:
        if (protocol := os.environ.get(name, "http/protobuf")) != "http/protobuf":
            raise ConfigError(name, protocol, "http/protobuf: collectors listen for it on port 4318")
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

    return OTLPSpanExporter()
