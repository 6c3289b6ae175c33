"""Traces by OpenTelemetry: what is a span of what, how logs name them, and nothing where nobody asks."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from aiohttp import web
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from aggregator.metrics import totals
from aggregator.open_telemetry import OpenTelemetry
from aggregator.service import Service
from aggregator.tracing import UNTRACED, open_tracer
from fedtt.cli import main
from fedtt.errors import ConfigError
from fedtt.evaluation import EvaluationSpec
from fedtt.seams import SystemClock
from fedtt.task import RoundSpec, TaskSpec
from storage.blobs import MemoryBlobs
from storage.memory import MemoryStore
from storage.records import VersionState
from tests.support import ledger
from tests.support.logged import REQUEST_ID, lines_of_a_failure
from tests.support.served import Served, served, task_text, until
from tests.support.tiny import add_task

CALLER = {"traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"}
THEIRS = 0x0AF7651916CD43DD8448EB211C80319C


def named(exporter: InMemorySpanExporter, name: str) -> list[ReadableSpan]:
    return [span for span in exporter.get_finished_spans() if span.name == name]


def trace_of(span: ReadableSpan) -> int:
    assert span.context is not None
    return int(span.context.trace_id)


async def version_1(server: Served) -> bool:
    return len(await server.admin.task("lights", "/versions")) == 2


async def test_a_request_its_reading_a_fold_and_a_release_are_spans(tmp_path: Path) -> None:
    exporter = InMemorySpanExporter()
    tracer = OpenTelemetry(SimpleSpanProcessor(exporter))
    async with served(tmp_path, task_text(cohort=1), tracer=tracer) as server, server.device() as peer:
        await peer.update()
        await until(lambda: version_1(server))
        answer = await server.raw("GET", "/healthz")
        await server.people("POST", "/tasks/lights/versions/1/hold")
    (asked,) = named(exporter, "POST /v1/admin/tasks/{task}/versions/{number}/{change}")
    (hold,) = named(exporter, "hold")
    assert (hold.parent, hold.attributes) == (asked.context, {"fedtt.version": 1})
    (upload,) = named(exporter, "PUT /v1/leases/{lease}/update")
    assert upload.attributes is not None
    assert upload.attributes["http.response.status_code"] == 200
    inside = [span for span in exporter.get_finished_spans() if span.parent == upload.context]
    assert "store.reading" in {span.name for span in inside}
    (fold,), (release,) = named(exporter, "fold"), named(exporter, "release")
    assert fold.attributes == {"fedtt.branch": "main", "fedtt.round": 1}
    assert release.attributes == {"fedtt.version": 1, "fedtt.state": "released"}
    assert release.parent == fold.context
    written = [span.attributes or {} for span in named(exporter, "store.transaction")]
    assert {"fedtt.updates.accepted": 1} in written
    assert {"fedtt.updates.folded": 1} in written
    (healthy,) = named(exporter, "GET /healthz")
    assert healthy.attributes is not None
    assert healthy.attributes["fedtt.request_id"] == answer.headers["X-Request-ID"]


@pytest.mark.parametrize("forwarded", [False, True])
async def test_a_proxy_may_say_of_which_trace_a_request_is_part_and_a_stranger_may_not(
    tmp_path: Path, forwarded: bool
) -> None:
    exporter = InMemorySpanExporter()
    tracer = OpenTelemetry(SimpleSpanProcessor(exporter))
    async with served(tmp_path, None, tracer=tracer, forwarded=forwarded) as server:
        await server.raw("GET", "/healthz", None, CALLER)
    (span,) = named(exporter, "GET /healthz")
    assert (trace_of(span) == THEIRS) is forwarded


async def test_what_a_tick_decides_about_a_candidate_is_a_span() -> None:
    exporter = InMemorySpanExporter()
    tracer, store = OpenTelemetry(SimpleSpanProcessor(exporter)), MemoryStore()
    service = Service(store, MemoryBlobs(), SystemClock(), inline=True, tracer=tracer)
    spec = TaskSpec(name="t", rounds=RoundSpec(count=9, cohort=1), evaluation=EvaluationSpec())
    with store.transaction() as tx:
        add_task(tx, spec, 0.0)
        tx.add_version(ledger.version(1, state=VersionState.CANDIDATE, round_number=None))
    await service.tick()  # nobody has judged it since 1970
    (hold,) = named(exporter, "hold")
    assert hold.attributes == {"fedtt.version": 1, "fedtt.state": "held"}
    assert totals(service.metrics.versions_decided, "state") == {"released": 0, "held": 1}


class Collector:
    """A listener for OTLP over HTTP."""

    def __init__(self) -> None:
        self.requests: list[ExportTraceServiceRequest] = []

    async def take(self, request: web.Request) -> web.Response:
        self.requests.append(ExportTraceServiceRequest.FromString(await request.read()))
        return web.Response(content_type="application/x-protobuf")

    def traces(self, key: str, value: str) -> set[str]:
        """Traces of the spans with this attribute."""
        return {
            span.trace_id.hex()
            for request in self.requests
            for resource in request.resource_spans
            for scope in resource.scope_spans
            for span in scope.spans
            if any(kept.key == key and kept.value.string_value == value for kept in span.attributes)
        }


async def test_a_server_process_sends_its_spans_by_otlp_and_its_log_names_their_trace(tmp_path: Path) -> None:
    collector, app = Collector(), web.Application()
    app.router.add_post("/v1/traces", collector.take)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    endpoint = f"http://127.0.0.1:{runner.addresses[0][1]}"
    env = {"OTEL_EXPORTER_OTLP_ENDPOINT": endpoint, "OTEL_SERVICE_NAME": "ours"}
    (line,) = await lines_of_a_failure(tmp_path, env)
    await runner.cleanup()
    assert {line["trace_id"]} == collector.traces("fedtt.request_id", REQUEST_ID)
    resource = collector.requests[0].resource_spans[0].resource
    assert "ours" in {kept.value.string_value for kept in resource.attributes}


def test_without_the_extra_asking_for_traces_is_refused_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delitem(sys.modules, "aggregator.open_telemetry")
    monkeypatch.setitem(sys.modules, "opentelemetry", None)
    assert main(["serve", "--data", str(tmp_path), "--traces"]) == 2
    assert capsys.readouterr().err == (
        "fedtt: error: --traces = 'on' is not allowed: traces only where OpenTelemetry is installed: "
        "pip install 'fedtt[otel]'\n"
    )
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:4318")
    with pytest.raises(ConfigError, match=r"OTEL_EXPORTER_OTLP_ENDPOINT .* pip install 'fedtt\[otel\]'"):
        open_tracer()
    monkeypatch.setenv("OTEL_SDK_DISABLED", "true")
    assert open_tracer(asked_for=True) is UNTRACED


def test_nothing_of_it_is_imported_where_nobody_asks() -> None:
    program = (
        "import sys, aggregator.app; from aggregator.tracing import open_tracer; open_tracer(); "
        "sys.exit(any(name.startswith('opentelemetry') for name in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False, env={}).returncode == 0


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("OTEL_TRACES_EXPORTER", "zipkin", "otlp, console or none"),
        ("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc", "http/protobuf"),
    ],
)
def test_what_is_not_supported_is_named(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, allowed: str
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=f"{name} = '{value}' is not allowed: {allowed}"):
        open_tracer(asked_for=True)
