"""Requests made up from the OpenAPI document: none meets a fault of the server, each answer is as documented.

Each operation is called in up to four ways: as an honest client would, with what the document allows at
names that the server knows, with what it allows at any, and with what it does not. Each pass begins with a
device that has a lease, and ends with it gone; what people stop, revoke and make is new in each pass, too.
So calls are taken as well as refused: which, and how often, is in the row's lines. Half of the passes have
their blobs in files, the others in object storage.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import count
from typing import Any
from urllib.parse import urlsplit

import msgspec
import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from msgspec import Struct
from schemathesis import APIOperation, Case, GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.core.failures import Failure, FailureGroup, ServerError
from schemathesis.core.result import Ok
from schemathesis.specs.openapi import checks

from aggregator.admin_client import AdminClient
from aggregator.openapi import document
from benchmarks.faults.devices import CHECK_IN, Device, Habits, Notes, frame_of
from benchmarks.faults.row import Outcome, Setting
from benchmarks.faults.server import TASK, ServerProcess, task_text
from edge_client.identity import Identity
from fedtt.manifest import MANIFEST, decode_manifest
from fedtt.messages import MEDIA_TYPE, Enroll, Work, encode
from fedtt.version_config import FACTORS

__all__ = ["Findings", "Side", "bearer", "explore", "run", "signed_by"]

NUMBERS = 20
ADMIN = "/v1/admin"
_NEVER_TAKEN = 4  #: calls: those that want a version which waits for its verdict
_CASES, _QUICK_CASES = 10_000, 1_000
_AT_ONCE = 20  #: requests of one kind to an operation before the next
_METHODS = frozenset({"delete", "get", "head", "post", "put"})
_CHECKS = [
    not_a_server_error,
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_headers_conformance,
    checks.response_schema_conformance,
]
Auth = Callable[[requests.PreparedRequest], requests.PreparedRequest]


class Side(Struct, frozen=True, kw_only=True):
    """One listener of a running server."""

    tag: str  #: of its calls in the document
    url: str
    auth: Auth
    known: Mapping[str, str]  #: part of a path -> a name that the server knows
    honest: Mapping[str, Mapping[str, Any]] = {}  #: call -> `body`, `query` and `path` that it takes


class Findings(Struct, kw_only=True):
    """What was asked, and what was wrong with the answers."""

    cases: int = 0
    statuses: Counter[int] = msgspec.field(default_factory=Counter)
    taken: Counter[str] = msgspec.field(default_factory=Counter)  #: calls answered with a 2xx
    server_errors: int = 0
    undocumented: int = 0
    examples: dict[str, str] = {}  #: one of each kind of failure

    def failed(self, case: Case[Any], failure: Failure) -> None:
        fault = isinstance(failure, ServerError)
        self.server_errors += fault
        self.undocumented += not fault
        name = f"{case.operation.label}: {type(failure).__name__}"
        self.examples.setdefault(name, f"{failure.message} {case.as_curl_command()}"[:1000])


def bearer(token: str) -> Auth:
    def auth(request: requests.PreparedRequest) -> requests.PreparedRequest:
        request.headers["Authorization"] = f"Bearer {token}"
        return request

    return auth


def signed_by(identity: Identity) -> Auth:
    def auth(request: requests.PreparedRequest) -> requests.PreparedRequest:
        url, body = urlsplit(request.url or ""), request.body or b""
        assert isinstance(body, bytes | str)
        headers = identity.sign(
            method=request.method or "",
            authority=url.netloc,
            path=url.path,
            body=body.encode() if isinstance(body, str) else body,
            created=int(time.time()),
            nonce=time.time_ns() // 1000,
        )
        request.headers.update(headers)
        return request

    return auth


@schemathesis.serializer(MEDIA_TYPE)
def _to_msgpack(_: Any, value: Any) -> bytes:
    if isinstance(value, bytes):
        return value
    try:
        return msgspec.msgpack.encode(value)
    except (OverflowError, TypeError):  # msgpack has no such number
        return b"\xc1"


@schemathesis.deserializer(MEDIA_TYPE)
def _from_msgpack(_: Any, response: schemathesis.Response) -> Any:
    return msgspec.to_builtins(msgspec.msgpack.decode(response.content))


@schemathesis.serializer("application/toml")
def _to_toml(_: Any, value: Any) -> bytes:
    return value if isinstance(value, bytes) else str(value).encode(errors="replace")


_LINES = st.sampled_from([*task_text().splitlines(), "[fold]", 'kind = "mean"', "seed = 1e999", "\0", "[["])
schemathesis.openapi.media_type(
    "application/toml",
    st.binary(max_size=200) | st.lists(_LINES, max_size=12).map(lambda lines: "\n".join(lines).encode()),
)


async def run(setting: Setting) -> Outcome:
    cases, findings = (_QUICK_CASES if setting.quick else _CASES), Findings()
    for blobs in ("files", "objects"):
        options = ("--blobs", "memory:///") if blobs == "objects" else ()
        server = ServerProcess(setting.directory / blobs / "data", options=options)
        async with server.running():
            await server.open_task(task_text(cohort=1_000_000, buffer=1), NUMBERS)
            loop, until = asyncio.get_running_loop(), cases * (1 + (blobs == "objects")) // 2

            def sides(number: int, server: ServerProcess = server) -> Sequence[Side]:
                return asyncio.run_coroutine_threadsafe(_pass(server, number), loop).result()  # noqa: B023

            await asyncio.to_thread(explore, sides, findings, until=until, seed=setting.seed)
    for name, example in findings.examples.items():
        setting.report.line(row="schemathesis", failure=name, example=example)
    paths = document()["paths"].items()
    calls = [f"{method.upper()} {path}" for path, item in paths for method in _METHODS & set(item)]
    never = sorted(set(calls) - set(findings.taken))
    setting.report.line(row="schemathesis", taken=dict(sorted(findings.taken.items())), never_taken=never)
    return Outcome(
        figures={
            "cases": findings.cases,
            "server_errors": findings.server_errors,
            "undocumented": findings.undocumented,
            "calls": len(calls),
            "calls_taken": len(calls) - len(never),
            **{f"status_{status}": count for status, count in sorted(findings.statuses.items())},
        },
        at_most={"server_errors": 0, "undocumented": 0},
        at_least={"cases": cases, "calls_taken": len(calls) - _NEVER_TAKEN},
    )


async def _pass(server: ServerProcess, number: int) -> Sequence[Side]:
    """A device with a lease, another for people to revoke, and what is honest of both sides."""
    notes, habits = Notes(), Habits()
    async with (
        Device(2 * number, server.url, NUMBERS, notes, habits) as device,
        Device(2 * number + 1, server.url, NUMBERS, notes, habits) as victim,
    ):
        for one in (device, victim):
            await one.enroll(server.token)
        work = await device.transport.check_in(CHECK_IN)
    assert isinstance(work, Work), work
    owner = (server.data / "admin-token").read_text().strip()
    async with AdminClient(f"http://127.0.0.1:{server.admin_port}", owner) as admin:
        token = await admin.create_token(None, None)
    public_key, blob, name = device.identity.public_key, b"blob", f"pass-{number}"
    manifest = (server.data.parent / "bundle" / MANIFEST).read_bytes()
    names = {"task": TASK, "number": "0", "lease": work.lease, "device": victim.identity.device, "name": name}
    version, tasks = f"{ADMIN}/tasks/{{task}}/versions/{{number}}/{{file}}", f"{ADMIN}/tasks"
    file, entry = next(iter(decode_manifest(manifest).files.items()))
    return (
        Side(
            tag="devices",
            url=server.url,
            auth=signed_by(device.identity),
            known={**names, "sha256": work.plan.version, "file": MANIFEST},
            honest={
                "POST /v1/enroll": {
                    "body": encode(Enroll(public_key=public_key, token=server.token, client="made up"))
                },
                "PUT /v1/leases/{lease}/update": {"body": frame_of(work.plan, NUMBERS, 0)},
                "GET /v1/bundles/{sha256}/{file}": {"path": {"sha256": work.plan.bundle, "file": file}},
            },
        ),
        Side(
            tag="people",
            url=f"http://127.0.0.1:{server.admin_port}",
            auth=bearer(owner),
            known={**names, "sha256": work.plan.bundle, "file": MANIFEST},
            honest={
                f"PUT {ADMIN}/blobs/{{sha256}}": {
                    "path": {"sha256": hashlib.sha256(blob).hexdigest()},
                    "body": blob,
                },
                f"HEAD {ADMIN}/blobs/{{sha256}}": {"path": {"sha256": entry.sha256}},
                f"POST {ADMIN}/bundles": {"body": manifest},
                f"POST {tasks}": {
                    "query": {"bundle": work.plan.bundle},
                    "body": task_text().replace(TASK, name).encode(),
                },
                f"POST {tasks}/{{task}}/stop": {"path": {"task": name}},
                f"GET {version}": {"path": {"file": FACTORS}},
                f"POST {ADMIN}/tokens/{{sha256}}/revoke": {"path": {"sha256": token["sha256"]}},
                f"POST {ADMIN}/admin-tokens": {"body": msgspec.json.encode({"name": name, "role": "viewer"})},
            },
        ),
    )


def explore(sides: Callable[[int], Sequence[Side]], findings: Findings, *, until: int, seed: int) -> None:
    """Pass after pass, each with its seed, until there are so many cases; operations come about as often."""
    operations: dict[str, list[APIOperation[Any, Any, Any, Any]]] = {}
    for number in count(seed):
        for side in sides(number):
            if side.tag not in operations:
                found = _schema(side.tag).get_all_operations()
                operations[side.tag] = [one.ok() for one in found if isinstance(one, Ok)]
            ways = [way for operation in operations[side.tag] for way in _ways(operation, side)]
            most = min(_AT_ONCE, 1 + (until - findings.cases) // len(ways))
            with requests.Session() as session:
                for mode, strategy in ways:
                    _ask(strategy, mode, side, findings, most=most, number=number, session=session)
        if findings.cases >= until:
            return


def _ways(
    operation: APIOperation[Any, Any, Any, Any], side: Side
) -> Iterator[tuple[GenerationMode, st.SearchStrategy[Case[Any]]]]:
    honest = side.honest.get(operation.label, {})
    known = {**side.known, **honest.get("path", {})}
    named = {p.name: known[p.name] for p in operation.path_parameters if p.name in known}
    if honest:
        given: dict[str, Any] = {"path_parameters": named} if named else {}
        given |= {"query": honest["query"]} if "query" in honest else {}
        yield (
            GenerationMode.POSITIVE,
            operation.as_strategy(**given).map(partial(_with_body, honest.get("body"))),
        )
    if named:
        yield GenerationMode.POSITIVE, operation.as_strategy(path_parameters=named)
    yield GenerationMode.POSITIVE, operation.as_strategy()
    if list(operation.query) or list(operation.body):  # hardly any part of a path can be wrong
        yield GenerationMode.NEGATIVE, operation.as_strategy(generation_mode=GenerationMode.NEGATIVE)


def _with_body(body: bytes | None, case: Case[Any]) -> Case[Any]:
    if body is not None:
        case.body = body
    return case


def _schema(tag: str) -> schemathesis.BaseSchema:
    """The document of one listener, its requests being signed or not by us alone."""
    config = schemathesis.Config.from_dict(
        {"checks": {"negative_data_rejection": {"expected-statuses": ["4XX"]}}}
    )
    known = document()
    paths = {
        path: {key: {**value, "security": []} if key in _METHODS else value for key, value in item.items()}
        for path, item in known["paths"].items()
    }
    return schemathesis.openapi.from_dict({**known, "paths": paths}, config=config).include(tag=tag)


def _ask(
    strategy: st.SearchStrategy[Case[Any]],
    mode: GenerationMode,
    side: Side,
    findings: Findings,
    *,
    most: int,
    number: int,
    session: requests.Session,
) -> None:
    expected = [*_CHECKS, *([checks.negative_data_rejection] if mode is GenerationMode.NEGATIVE else [])]

    @seed(number)
    @settings(
        max_examples=most,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=strategy)
    def ask(case: Case[Any]) -> None:
        auth = None if mode is GenerationMode.NEGATIVE and findings.cases % 10 == 0 else side.auth
        response = case.call(base_url=side.url, auth=auth, session=session)
        findings.cases += 1
        findings.statuses[response.status_code] += 1
        if response.status_code < 300:
            findings.taken[case.operation.label] += 1
        try:
            case.validate_response(response, checks=expected)
        except FailureGroup as group:
            for failure in group.exceptions:
                findings.failed(case, failure)

    ask()
