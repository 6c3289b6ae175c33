"""Requests made up from the OpenAPI document: none meets a fault of the server, each answer is as documented.

Each operation is called three ways: with what the document allows, with what it does not allow, and with what
it allows at names that the server knows. Devices' requests are signed by an enrolled device, so that they get
as far as the calls themselves.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
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

from aggregator.openapi import document
from benchmarks.faults.devices import CHECK_IN, Device, Habits, Notes
from benchmarks.faults.row import Outcome, Setting
from benchmarks.faults.server import TASK, ServerProcess, task_text
from edge_client.identity import Identity
from fedtt.manifest import MANIFEST
from fedtt.messages import MEDIA_TYPE, Work

__all__ = ["Findings", "Side", "bearer", "explore", "run", "signed_by"]

NUMBERS = 20
_CASES, _QUICK_CASES = 10_000, 1_000
_AT_ONCE = 20  #: requests of one kind to an operation before the next
_METHODS = frozenset({"delete", "get", "head", "post", "put"})
_CHECKS = [
    not_a_server_error,
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_headers_conformance,
    checks.response_schema_conformance,
    checks.negative_data_rejection,
]
Auth = Callable[[requests.PreparedRequest], requests.PreparedRequest]


class Side(Struct, frozen=True, kw_only=True):
    """One listener of a running server."""

    tag: str  #: of its calls in the document
    url: str
    auth: Auth
    known: Mapping[str, str]  #: part of a path -> a name that the server knows


class Findings(Struct, kw_only=True):
    """What was asked, and what was wrong with the answers."""

    cases: int = 0
    statuses: Counter[int] = msgspec.field(default_factory=Counter)
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
    cases = _QUICK_CASES if setting.quick else _CASES
    server, findings = ServerProcess(setting.directory / "data"), Findings()
    async with server.running():
        await server.open_task(task_text(cohort=1000), NUMBERS)
        async with Device(0, server.url, NUMBERS, Notes(), Habits()) as device:
            await device.enroll(server.token)
            work = await device.transport.check_in(CHECK_IN)
            assert isinstance(work, Work), work
            names = {"task": TASK, "number": "0", "lease": work.lease, "device": "0" * 32}
            token = (server.data / "admin-token").read_text().strip()
            sides = {
                2 * cases // 3: Side(
                    tag="people",
                    url=f"http://127.0.0.1:{server.admin_port}",
                    auth=bearer(token),
                    known={**names, "sha256": work.plan.bundle, "file": MANIFEST},
                ),
                cases - 2 * cases // 3: Side(
                    tag="devices",
                    url=server.url,
                    auth=signed_by(device.identity),
                    known={**names, "sha256": work.plan.version},
                ),
            }
            for share, side in sides.items():
                await asyncio.to_thread(explore, side, findings, cases=share, seed=setting.seed)
    for name, example in findings.examples.items():
        setting.report.line(row="schemathesis", failure=name, example=example)
    return Outcome(
        figures={
            "cases": findings.cases,
            "server_errors": findings.server_errors,
            "undocumented": findings.undocumented,
            **{f"status_{status}": count for status, count in sorted(findings.statuses.items())},
        },
        at_most={"server_errors": 0, "undocumented": 0},
        at_least={"cases": cases},
    )


def explore(side: Side, findings: Findings, *, cases: int, seed: int) -> None:
    """Ask a listener at least so many times, each operation about as often, with one seed after another."""
    until = findings.cases + cases
    operations = [found.ok() for found in _schema(side.tag).get_all_operations() if isinstance(found, Ok)]
    ways = [way for operation in operations for way in _ways(operation, side.known)]
    most = min(_AT_ONCE, 1 + cases // len(ways))
    with requests.Session() as session:
        for number in count(seed):
            for mode, strategy in ways:
                _ask(strategy, mode, side, findings, most=most, number=number, session=session)
            if findings.cases >= until:
                return


def _ways(
    operation: APIOperation[Any, Any, Any, Any], known: Mapping[str, str]
) -> Iterator[tuple[GenerationMode, st.SearchStrategy[Case[Any]]]]:
    named = {p.name: known[p.name] for p in operation.path_parameters if p.name in known}
    if named:
        yield GenerationMode.POSITIVE, operation.as_strategy(path_parameters=named)
    yield GenerationMode.POSITIVE, operation.as_strategy()
    if list(operation.query) or list(operation.body):  # hardly any part of a path can be wrong
        yield GenerationMode.NEGATIVE, operation.as_strategy(generation_mode=GenerationMode.NEGATIVE)


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
        try:
            case.validate_response(response, checks=_CHECKS)
        except FailureGroup as group:
            for failure in group.exceptions:
                findings.failed(case, failure)

    ask()
