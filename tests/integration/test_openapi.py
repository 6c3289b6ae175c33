"""The OpenAPI document against the routes, the messages and what a real server answers."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import jsonschema_rs
import msgspec
import pytest
from aiohttp import web
from yarl import URL

from aggregator.admin_routes import add_admin_routes
from aggregator.calls import ADMIN_CALLS, DEVICE_CALLS
from aggregator.device_routes import add_device_routes
from aggregator.openapi import document
from benchmarks.faults.schemathesis import Findings, Side, bearer, explore
from fedtt.manifest import MANIFEST
from fedtt.messages import MEDIA_TYPE, STATUS, Message, encode
from tests.support.served import CHECK_IN, Answer, Peer, Served, frame_of, send, served, task_text

METHODS = ("delete", "get", "head", "post", "put")


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[Served]:
    async with served(tmp_path, task_text()) as started:
        yield started


def operations() -> dict[tuple[str, str], Any]:
    """(method, path) -> what the document says of it."""
    paths = document()["paths"]
    return {(m.upper(), path): paths[path][m] for path in paths for m in METHODS if m in paths[path]}


FILLED = {"task": "t", "number": "1", "sha256": "0" * 64, "file": "f", "lease": "0" * 32}


def takes(resource: web.AbstractResource, path: str) -> bool:
    """Whether a path of the document, with something in its parts, is one that a route matches."""
    pattern = resource.get_info().get("pattern")
    filled = path.format(**FILLED, device="d", name="n")
    return pattern.fullmatch(filled) is not None if pattern else resource.canonical == path


@pytest.mark.parametrize(
    ("add_routes", "calls"), [(add_device_routes, DEVICE_CALLS), (add_admin_routes, ADMIN_CALLS)]
)
def test_every_route_is_in_the_document_and_nothing_else_is(add_routes: Any, calls: dict[str, Any]) -> None:
    app = web.Application()
    add_routes(app)
    routes = {(r.method, r.resource) for r in app.router.routes() if r.resource}
    described = {tuple(call.split(" ")) for call in calls}
    assert described <= set(operations())
    for method, path in described:
        assert any(method == verb and takes(resource, path) for verb, resource in routes), path
    for method, resource in routes:
        assert any(takes(resource, path) for verb, path in described if verb in {method, "GET"}), resource
    assert len(operations()) == len(DEVICE_CALLS) + len(ADMIN_CALLS)


def test_every_message_and_every_code_is_in_the_document() -> None:
    schemas = document()["components"]["schemas"]
    assert {kind.__name__ for kind in Message.__subclasses__()} <= set(schemas)
    for kind in Message.__subclasses__():
        fields = {field.encode_name for field in msgspec.structs.fields(kind)}
        assert set(schemas[kind.__name__]["properties"]) == fields | {"type"}
    assert set(schemas["Code"]["enum"]) == {code.value for code in STATUS}


def test_the_document_is_well_formed() -> None:
    found = document()
    names = [operation["operationId"] for operation in operations().values()]
    assert len(names) == len(set(names))
    for schema in found["components"]["schemas"].values():
        jsonschema_rs.meta.validate(schema)
    text = msgspec.json.encode(found).decode()
    assert "$slot" not in text
    for reference in {part.split('"')[0] for part in text.split('"$ref":"#/components/schemas/')[1:]}:
        assert reference in found["components"]["schemas"]


async def test_a_message_of_the_only_type_that_a_call_takes_needs_no_tag(server: Served) -> None:
    async with Peer(server.url, 7) as peer:
        await peer.enroll(server.token)
        untagged = {k: v for k, v in msgspec.to_builtins(CHECK_IN).items() if k != "type"}
        answer = await peer.request("POST", "/v1/check-in", msgspec.msgpack.encode(untagged))
    schema = {"$ref": "#/components/schemas/CheckIn", "components": document()["components"]}
    jsonschema_rs.validate(schema, untagged)
    assert answer.status == 200


async def test_it_is_served_without_a_token_and_printed(server: Served) -> None:
    answer = await send(URL(server.listening.admin_url + "/openapi.json"), "GET", None, {})
    assert (answer.status, answer.headers["Content-Type"]) == (200, "application/json")
    command = [sys.executable, "-m", "fedtt", "openapi"]
    printed = await asyncio.to_thread(subprocess.run, command, capture_output=True, check=True)
    assert msgspec.json.decode(answer.body) == msgspec.json.decode(printed.stdout)


def conforms(method: str, path: str, answer: Answer) -> None:
    """Check an answer of the devices' listener against the document."""
    response = operations()[method, path]["responses"][str(answer.status)]
    assert (answer.body == b"") == ("content" not in response)
    if "content" in response:
        schema = response["content"][answer.headers["Content-Type"]]["schema"]
        value = msgspec.to_builtins(msgspec.msgpack.decode(answer.body))
        jsonschema_rs.validate({**schema, "components": document()["components"]}, value)


async def test_what_a_device_is_answered_is_what_the_document_says(server: Served) -> None:
    async with Peer(server.url, 7) as peer:
        await peer.enroll(server.token)
        answer = await peer.request("POST", "/v1/check-in", encode(CHECK_IN))
        conforms("POST", "/v1/check-in", answer)
        work = await peer.work()
        lease = f"/v1/leases/{work.lease}"
        for body in (b"?", frame_of(work.plan), frame_of(work.plan, steps=9)):  # 400, 200, 409
            sent = await peer.request("PUT", f"{lease}/update", body)
            conforms("PUT", "/v1/leases/{lease}/update", sent)
        conforms("GET", "/v1/leases/{lease}", await peer.request("GET", lease))
        unsigned = await server.raw("POST", "/v1/check-in", encode(CHECK_IN))
        assert (unsigned.status, unsigned.headers["Content-Type"]) == (401, MEDIA_TYPE)
        conforms("POST", "/v1/check-in", unsigned)
        conforms("POST", "/v1/device/leave", await peer.request("POST", "/v1/device/leave"))


@pytest.mark.slow
async def test_made_up_calls_of_people_meet_no_fault_and_no_answer_that_is_not_in_the_document(
    server: Served,
) -> None:
    task = await server.admin.task("lights")
    side = Side(
        tag="people",
        url=server.listening.admin_url,
        auth=bearer(server.listening.admin_token),
        known={"task": "lights", "number": "0", "sha256": task["bundle"], "file": MANIFEST},
    )
    findings = Findings()
    await asyncio.to_thread(explore, lambda _: [side], findings, until=100, seed=0)
    assert (findings.server_errors, findings.undocumented, findings.examples) == (0, 0, {})
    assert {200, 201, 400, 403, 404, 409} <= set(findings.statuses)
