"""The calls of people: JSON, metrics and the dashboard, on a listener of their own, with a token."""

from __future__ import annotations

import re

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from aggregator import admin
from aggregator.auth import same_token
from aggregator.dashboard import dashboard
from aggregator.device_routes import serve_bundle_file
from aggregator.handling import SERVICE, ProblemError, body_pieces, checked, json_answer, read_body
from aggregator.observation import METRICS_TYPE, activity, metrics_text, population
from aggregator.problems import forbidden, malformed, not_found
from fedtt.manifest import MANIFEST_LIMIT_BYTES
from fedtt.messages import Problem
from storage.records import TaskState

__all__ = ["add_admin_routes", "admin_problem", "require_token"]

_TASK_LIMIT_BYTES = 64 * 1024
_BLOB_LIMIT_BYTES = 8 << 30
_TOKEN_TERMS_LIMIT_BYTES = 1000
_VERDICT_LIMIT_BYTES = 1000
_SHA256 = re.compile("[0-9a-f]{64}")
_ROUNDS = 1000  #: most rounds in one answer
_OPEN = frozenset({("GET", "/")})  #: the dashboard's page, which holds nothing


def admin_problem(problem: Problem, status: int) -> web.Response:
    return json_answer({"error": problem}, status)


def require_token(sha256: str) -> Middleware:
    """Middleware: `Authorization: Bearer …` with the token of this hash, for all but the dashboard's page."""

    @web.middleware
    async def middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
        scheme, _, token = request.headers.get("Authorization", "").partition(" ")
        known = scheme == "Bearer" and same_token(token, sha256)
        if not known and (request.method, request.path) not in _OPEN:
            raise ProblemError(forbidden())
        return await handler(request)

    return middleware


async def has_blob(request: web.Request) -> web.Response:
    present = request.app[SERVICE].blobs.has(request.match_info["sha256"])
    return web.Response(status=200 if present else 404)


async def put_blob(request: web.Request) -> web.Response:
    """Store one file of a bundle under its sha256; sending it again is harmless."""
    sha256 = request.match_info["sha256"]
    pieces = body_pieces(request, _BLOB_LIMIT_BYTES)
    await request.app[SERVICE].blobs.receive(sha256, pieces, limit_bytes=_BLOB_LIMIT_BYTES)
    return json_answer({"sha256": sha256}, 201)


async def add_bundle(request: web.Request) -> web.Response:
    manifest = await read_body(request, MANIFEST_LIMIT_BYTES)
    return json_answer({"bundle": checked(await admin.add_bundle(request.app[SERVICE], manifest))}, 201)


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
    return json_answer(checked(await admin.create_token(request.app[SERVICE], terms)), 201)


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
    return json_answer(checked(await admin.list_versions(request.app[SERVICE], request.match_info["task"])))


async def version_file(request: web.Request) -> web.Response:
    task, number, name = (request.match_info[key] for key in ("task", "number", "file"))
    files = checked(await admin.version_files(request.app[SERVICE], task, int(number)))
    if name not in files:
        raise ProblemError(not_found(f"file {name[:100]!r} in a version"))
    return web.Response(body=files[name], content_type="application/octet-stream")


async def change_version(request: web.Request) -> web.Response:
    task, number, change = (request.match_info[key] for key in ("task", "number", "change"))
    return json_answer(checked(await admin.change_version(request.app[SERVICE], task, int(number), change)))


async def judge_version(request: web.Request) -> web.Response:
    """Body: {"examples": N, "before": {"loss": …, "right": …}, "after": {…}}."""
    task, number = request.match_info["task"], int(request.match_info["number"])
    verdict = await read_body(request, _VERDICT_LIMIT_BYTES)
    return json_answer(checked(await admin.judge_version(request.app[SERVICE], task, number, verdict)))


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
    add("POST", root + "/tokens", create_token)
    add("GET", root + "/population", show_population)
    add("GET", root + "/activity", show_activity)
    add("GET", "/metrics", metrics)
    add("GET", "/", dashboard)
