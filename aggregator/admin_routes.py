"""The calls of people: JSON, metrics and the dashboard, on a listener of their own, with a token."""

from __future__ import annotations

import re

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from aggregator import admin, admin_versions, enrolment, people
from aggregator.answers import Refusal, SentBlob
from aggregator.dashboard import dashboard
from aggregator.device_routes import serve_bundle_file
from aggregator.handling import SERVICE, ProblemError, body_pieces, checked, json_answer, read_body
from aggregator.observation import METRICS_TYPE, activity, metrics_text, population
from aggregator.openapi import openapi
from aggregator.people import ACTOR, actor_of, may
from aggregator.problems import forbidden, malformed, not_found, not_your_role
from fedtt.manifest import MANIFEST_LIMIT_BYTES
from fedtt.messages import Problem
from storage.records import Role, TaskState

__all__ = ["add_admin_routes", "admin_problem", "require_token"]

_TASK_LIMIT_BYTES = 64 * 1024
_BLOB_LIMIT_BYTES = 8 << 30
_TOKEN_TERMS_LIMIT_BYTES = 1000
_VERDICT_LIMIT_BYTES = 1000
_SHA256 = re.compile("[0-9a-f]{64}")
_ROUNDS = 1000  #: most rounds in one answer
_ADMIN_TOKENS = "/v1/admin/admin-tokens"
_REVOKE_TOKEN = _ADMIN_TOKENS + "/{name}/revoke"
_REVOKE_DEVICE = "/v1/admin/devices/{device}/revoke"
_ADMINS = frozenset({_ADMIN_TOKENS, _REVOKE_TOKEN, _REVOKE_DEVICE})  #: what takes an admin, but for looking
_OPEN = frozenset({("GET", "/"), ("GET", "/openapi.json")})  #: which hold nothing


def admin_problem(problem: Problem, status: int) -> web.Response:
    return json_answer(Refusal(error=problem), status)


def require_token(sha256: str) -> Middleware:
    """Middleware: `Authorization: Bearer …` with a token whose role allows the call; none for the dashboard's
    page and the OpenAPI document.

    sha256: of the token that lies beside the database, which may do everything.
    """

    @web.middleware
    async def middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
        scheme, _, token = request.headers.get("Authorization", "").partition(" ")
        if (request.method, request.path) in _OPEN:
            return await handler(request)
        known = await actor_of(request.app[SERVICE], token, sha256) if scheme == "Bearer" else None
        if known is None:
            raise ProblemError(forbidden())
        (name, role), needed = known, _needed(request)
        if not may(role, needed):
            raise ProblemError(not_your_role(name, role.value, needed.value))
        ACTOR.set(name)
        return await handler(request)

    return middleware


def _needed(request: web.Request) -> Role:
    """The least role for a call: looking takes a viewer, rights over people and devices take an admin."""
    if request.method in {"GET", "HEAD"}:
        return Role.VIEWER
    resource = request.match_info.route.resource
    return Role.ADMIN if resource and resource.canonical in _ADMINS else Role.OPERATOR


async def create_admin_token(request: web.Request) -> web.Response:
    """Body: {"name": …, "role": …, "expires_s": S or null}."""
    terms = await read_body(request, _TOKEN_TERMS_LIMIT_BYTES)
    return json_answer(checked(await people.create_admin_token(request.app[SERVICE], terms)), 201)


async def list_admin_tokens(request: web.Request) -> web.Response:
    return json_answer(await people.list_admin_tokens(request.app[SERVICE]))


async def revoke_admin_token(request: web.Request) -> web.Response:
    name = request.match_info["name"]
    return json_answer(checked(await people.revoke_admin_token(request.app[SERVICE], name)))


async def revoke_device(request: web.Request) -> web.Response:
    device = request.match_info["device"]
    return json_answer(checked(await people.revoke_device(request.app[SERVICE], device)))


async def list_audit(request: web.Request) -> web.Response:
    """Query: after=N for what follows that entry."""
    after = request.query.get("after", "0")
    if not re.fullmatch("[0-9]{1,15}", after):
        raise ProblemError(malformed("after must be a whole number"))
    return json_answer(await people.list_audit(request.app[SERVICE], int(after)))


async def has_blob(request: web.Request) -> web.Response:
    service = request.app[SERVICE]
    present = await service.beside_blobs(service.blobs.has, request.match_info["sha256"])
    return web.Response(status=200 if present else 404)


async def put_blob(request: web.Request) -> web.Response:
    """Store one file of a bundle under its sha256; sending it again is harmless."""
    sha256 = request.match_info["sha256"]
    service, pieces = request.app[SERVICE], body_pieces(request, _BLOB_LIMIT_BYTES)
    size_bytes = await service.blobs.receive(sha256, pieces, limit_bytes=_BLOB_LIMIT_BYTES)
    await admin.note_blob(service, sha256, size_bytes)
    return json_answer(SentBlob(sha256=sha256), 201)


async def add_bundle(request: web.Request) -> web.Response:
    manifest = await read_body(request, MANIFEST_LIMIT_BYTES)
    return json_answer(checked(await admin.add_bundle(request.app[SERVICE], manifest)), 201)


async def create_task(request: web.Request) -> web.Response:
    """Body: the task file as it is; query: bundle=<sha256>."""
    bundle = request.query.get("bundle", "")
    if not _SHA256.fullmatch(bundle):
        raise ProblemError(malformed("the query must name bundle=<sha256 of its manifest>"))
    text = (await read_body(request, _TASK_LIMIT_BYTES)).decode(errors="replace")
    return json_answer(checked(await admin.create_task(request.app[SERVICE], text, bundle)), 201)


async def create_token(request: web.Request) -> web.Response:
    """Body: {"uses": N, "expires_s": S}, either of them null or left out."""
    terms = await read_body(request, _TOKEN_TERMS_LIMIT_BYTES)
    return json_answer(checked(await enrolment.create_token(request.app[SERVICE], terms)), 201)


async def revoke_token(request: web.Request) -> web.Response:
    sha256 = request.match_info["sha256"]
    return json_answer(checked(await enrolment.revoke_token(request.app[SERVICE], sha256)))


async def list_tasks(request: web.Request) -> web.Response:
    return json_answer(await admin.list_tasks(request.app[SERVICE]))


async def show_task(request: web.Request) -> web.Response:
    return json_answer(checked(await admin.show_task(request.app[SERVICE], request.match_info["task"])))


async def change_task(request: web.Request) -> web.Response:
    states = {"pause": TaskState.PAUSED, "resume": TaskState.ACTIVE, "stop": TaskState.STOPPED}
    name, state = request.match_info["task"], states[request.match_info["change"]]
    return json_answer(checked(await admin.change_task(request.app[SERVICE], name, state)))


async def list_rounds(request: web.Request) -> web.Response:
    """Query: limit=N for the newest N alone."""
    limit = request.query.get("limit", str(_ROUNDS))
    if not re.fullmatch("[1-9][0-9]{0,3}", limit) or int(limit) > _ROUNDS:
        raise ProblemError(malformed(f"limit must be a whole number from 1 to {_ROUNDS}"))
    name = request.match_info["task"]
    return json_answer(checked(await admin.list_rounds(request.app[SERVICE], name, int(limit))))


async def list_versions(request: web.Request) -> web.Response:
    return json_answer(
        checked(await admin_versions.list_versions(request.app[SERVICE], request.match_info["task"]))
    )


async def version_file(request: web.Request) -> web.Response:
    task, number, name = (request.match_info[key] for key in ("task", "number", "file"))
    files = checked(await admin_versions.version_files(request.app[SERVICE], task, int(number)))
    if name not in files:
        raise ProblemError(not_found(f"file {name[:100]!r} in a version"))
    return web.Response(body=files[name], content_type="application/octet-stream")


async def change_version(request: web.Request) -> web.Response:
    task, number, change = (request.match_info[key] for key in ("task", "number", "change"))
    return json_answer(
        checked(await admin_versions.change_version(request.app[SERVICE], task, int(number), change))
    )


async def judge_version(request: web.Request) -> web.Response:
    """Body: {"examples": N, "before": {"loss": …, "right": …}, "after": {…}}."""
    task, number = request.match_info["task"], int(request.match_info["number"])
    verdict = await read_body(request, _VERDICT_LIMIT_BYTES)
    return json_answer(
        checked(await admin_versions.judge_version(request.app[SERVICE], task, number, verdict))
    )


async def list_devices(request: web.Request) -> web.Response:
    after = request.query.get("after", "")
    return json_answer(await admin.list_devices(request.app[SERVICE], after))


async def show_population(request: web.Request) -> web.Response:
    return json_answer(await population(request.app[SERVICE]))


async def show_activity(request: web.Request) -> web.Response:
    return json_answer(activity(request.app[SERVICE]))


async def metrics(request: web.Request) -> web.Response:
    text = await metrics_text(request.app[SERVICE])
    return web.Response(body=text, headers={"Content-Type": METRICS_TYPE})


def add_admin_routes(app: web.Application) -> None:
    add, root = app.router.add_route, "/v1/admin"
    add("HEAD", root + "/blobs/{sha256:[0-9a-f]{64}}", has_blob)
    add("PUT", root + "/blobs/{sha256:[0-9a-f]{64}}", put_blob)
    add("POST", root + "/bundles", add_bundle)
    add("GET", root + "/bundles/{sha256:[0-9a-f]{64}}/{file}", serve_bundle_file)
    add("GET", root + "/tasks", list_tasks)
    add("POST", root + "/tasks", create_task)
    add("GET", root + "/tasks/{task}", show_task)
    add("POST", root + "/tasks/{task}/{change:pause|resume|stop}", change_task)
    add("GET", root + "/tasks/{task}/rounds", list_rounds)
    add("GET", root + "/tasks/{task}/versions", list_versions)
    add("GET", root + r"/tasks/{task}/versions/{number:\d{1,9}}/{file}", version_file)
    add(
        "POST",
        root + r"/tasks/{task}/versions/{number:\d{1,9}}/{change:release|hold|rollback}",
        change_version,
    )
    add("POST", root + r"/tasks/{task}/versions/{number:\d{1,9}}/verdict", judge_version)
    add("GET", root + "/devices", list_devices)
    add("POST", _REVOKE_DEVICE, revoke_device)
    add("POST", root + "/tokens", create_token)
    add("POST", root + "/tokens/{sha256:[0-9a-f]{64}}/revoke", revoke_token)
    add("GET", _ADMIN_TOKENS, list_admin_tokens)
    add("POST", _ADMIN_TOKENS, create_admin_token)
    add("POST", _REVOKE_TOKEN, revoke_admin_token)
    add("GET", root + "/audit", list_audit)
    add("GET", root + "/population", show_population)
    add("GET", root + "/activity", show_activity)
    add("GET", "/metrics", metrics)
    add("GET", "/openapi.json", openapi)
    add("GET", "/", dashboard)
