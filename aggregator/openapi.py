"""The OpenAPI 3.1 document of both listeners, from their route tables and the very types that they decode."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from importlib.metadata import version
from types import NoneType
from typing import Any, get_args

import msgspec
from aiohttp import web
from msgspec import Meta, Struct

from aggregator.answers import Refusal
from aggregator.calls import ADMIN_CALLS, DEVICE_CALLS, FILE_PARTS, JSON, Call
from aggregator.device_routes import add_device_routes
from aggregator.handling import json_answer
from fedtt.messages import MEDIA_TYPE, STATUS, AsTold, Code, Message, Problem

__all__ = ["document", "openapi"]

Json = dict[str, Any]
_DYNAMIC = re.compile(r"\(\?P<(\w+)>(.*?)\)(?=/|$)")
_WORDS = re.compile(r"[a-z]+(\|[a-z]+)+")
_ALWAYS = (Code.MALFORMED, Code.NOT_FOUND, Code.INTERNAL, Code.BUSY)
_UNSIGNED = (Code.BAD_SIGNATURE, Code.UNKNOWN_DEVICE, Code.CLOCK_SKEW, Code.REPLAYED, Code.REVOKED)
_SIGNATURE = ("Content-Digest", "Signature-Input", "Signature")
_ABOUT = """\
Two listeners: devices speak msgpack under signed requests (docs/protocol.md says how), people speak JSON \
with a token. Where a message travels as msgpack its schema is that of the map, and what has \
`contentEncoding: base64` is a byte string. Every refusal is a Problem and has changed nothing."""


class _Listener(Struct, frozen=True, kw_only=True):
    """What the calls of one listener have in common."""

    tag: str
    add_routes: Callable[[web.Application], None]
    calls: Mapping[str, Call]
    media_type: str  #: of messages and refusals
    refusal: type
    refuses: tuple[Code, ...]  #: what any call may be refused with
    guarded: tuple[Code, ...]  #: and what any but the open ones
    security: list[dict[str, list[str]]]
    servers: list[Json] = []


def _listeners() -> tuple[_Listener, ...]:
    from aggregator.admin_routes import add_admin_routes  # which serves this document

    devices = _Listener(
        tag="devices",
        add_routes=add_device_routes,
        calls=DEVICE_CALLS,
        media_type=MEDIA_TYPE,
        refusal=Problem,
        refuses=(*_ALWAYS, Code.TOO_MANY),
        guarded=_UNSIGNED,
        security=[{name: [] for name in _SIGNATURE}],
        servers=[
            {
                "url": "{listener}",
                "description": "the devices' listener",
                "variables": {"listener": {"default": "http://127.0.0.1:8440"}},
            }
        ],
    )
    people = _Listener(
        tag="people",
        add_routes=add_admin_routes,
        calls=ADMIN_CALLS,
        media_type=JSON,
        refusal=Refusal,
        refuses=_ALWAYS,
        guarded=(Code.FORBIDDEN,),
        security=[{"token": []}],
    )
    return devices, people


class _Types:
    """Types in the order they are met, and their schemas once all are known."""

    def __init__(self) -> None:
        self._met: list[Any] = list(Message.__subclasses__())

    def slot(self, kind: Any) -> Json:
        """Stands for the type's schema until `fill`."""
        self._met.append(kind)
        return {"$slot": len(self._met) - 1}

    def fill(self, value: Any) -> tuple[Any, Json]:
        """The value with each slot's schema in its place, and the schemas that these refer to."""
        schemas, components = msgspec.json.schema_components(
            self._met, ref_template="#/components/schemas/{name}"
        )

        def filled(part: Any) -> Any:
            if isinstance(part, dict):
                return schemas[part["$slot"]] if "$slot" in part else {k: filled(v) for k, v in part.items()}
            return [filled(item) for item in part] if isinstance(part, list) else part

        for name, schema in components.items():  # a tag is asked for where it alone tells two types apart
            if name != AsTold.__name__ and schema.get("required", [])[:1] == ["type"]:
                del schema["required"][0]
        return filled(value), components


@cache
def document() -> Json:
    """The whole document; raises KeyError where a route is not described in `aggregator.calls`."""
    types, paths = _Types(), dict[str, Json]()
    for listener in _listeners():
        for method, path, patterns in _routes(listener.add_routes):
            operation = _operation(types, listener, listener.calls[f"{method} {path}"], patterns)
            operation["operationId"] = _name(method, path)
            item = paths.setdefault(path, {"servers": listener.servers} if listener.servers else {})
            item[method.lower()] = _without_bodies(operation) if method == "HEAD" else operation
    filled, schemas = types.fill(paths)
    header = {"type": "apiKey", "in": "header"}
    about = "a header of the request's signature, a fixed profile of RFC 9421 with Ed25519"
    return {
        "openapi": "3.1.0",
        "info": {"title": "fedtt", "version": version("fedtt"), "description": _ABOUT},
        "servers": [{"url": "/", "description": "the admin listener, which serves this document"}],
        "paths": filled,
        "components": {
            "schemas": schemas,
            "securitySchemes": {
                "token": {"type": "http", "scheme": "bearer"},
                **{name: {**header, "name": name, "description": about} for name in _SIGNATURE},
            },
        },
    }


def _routes(add_routes: Callable[[web.Application], None]) -> Iterator[tuple[str, str, dict[str, str]]]:
    """(method, path, pattern of each part of it); where a part is one of some words, a path for each."""
    app = web.Application()
    add_routes(app)
    for route in app.router.routes():
        if route.resource is None or (route.method == "HEAD" and _has_get(route.resource)):
            continue
        found = route.resource.get_info().get("pattern")
        parts = dict(_DYNAMIC.findall(found.pattern)) if found else {}
        path = route.resource.canonical
        choice = next((name for name, pattern in parts.items() if _WORDS.fullmatch(pattern)), None)
        words = parts.pop(choice).split("|") if choice else [""]
        for word in words:
            yield route.method, path.replace(f"{{{choice}}}", word), parts


def _has_get(resource: web.AbstractResource) -> bool:
    """aiohttp answers HEAD wherever it answers GET."""
    return any(route.method == "GET" for route in resource)


def _name(method: str, path: str) -> str:
    """Such as get_admin_tasks_task_rounds."""
    words = re.findall(r"[a-z0-9]+", path.removeprefix("/v1")) or ["page"]
    return "_".join((method.lower(), *words))


def _operation(types: _Types, listener: _Listener, call: Call, patterns: Mapping[str, str]) -> Json:
    parameters = [
        {
            "name": name,
            "in": "path",
            "required": True,
            "schema": {"type": "string", "minLength": 1, "pattern": f"^{pattern}$"},
        }
        for name, pattern in patterns.items()
    ]
    for name, kind in call.query.items():
        optional = NoneType in get_args(kind)
        schema = types.slot(_present(kind))
        parameters.append({"name": name, "in": "query", "required": not optional, "schema": schema})
    if call.ranged:
        part = {"type": "string", "pattern": "^bytes=([0-9]{1,15}-[0-9]{0,15}|-[1-9][0-9]{0,14})$"}
        parameters.append({"name": "Range", "in": "header", "required": False, "schema": part})
    operation: Json = {
        "summary": call.about,
        "tags": [listener.tag],
        "parameters": parameters,
        "responses": _responses(types, listener, call),
        "security": listener.security if call.signed else [],
    }
    if call.takes is not None:
        content = _content(types, call.takes, listener.media_type)
        operation["requestBody"] = {"required": True, "content": content}
    return operation


def _present(kind: Any) -> Any:
    """A parameter's type where it is there at all."""
    left = [arm for arm in get_args(kind) if arm is not NoneType and not isinstance(arm, Meta)]
    return left[0] if NoneType in get_args(kind) else kind


def _responses(types: _Types, listener: _Listener, call: Call) -> Json:
    good: Json = {"description": call.about}
    if call.gives is not None:
        media_type = listener.media_type if call.signed or listener.media_type == JSON else JSON
        good["content"] = _content(types, call.gives, media_type)
    responses = {str(call.status): good}
    if call.ranged:
        part, past = FILE_PARTS
        responses[str(part)] = {**good, "description": "the part asked for"}
        refusal = _content(types, listener.refusal, listener.media_type)
        responses[str(past)] = {"description": "the file has no such part", "content": refusal}
    codes = (*listener.refuses, *(listener.guarded if call.signed else ()), *call.refuses)
    for status in sorted({STATUS[code] for code in codes}):
        names = ", ".join(sorted({code.value for code in codes if STATUS[code] == status}))
        responses[str(status)] = {
            "description": f"refused: {names}",
            "content": _content(types, listener.refusal, listener.media_type),
        }
    return responses


def _content(types: _Types, body: Any, media_type: str) -> Json:
    if isinstance(body, tuple):
        return {name: {} for name in body}
    return {media_type: {"schema": types.slot(body)}}


def _without_bodies(operation: Json) -> Json:
    bare = {status: {"description": r["description"]} for status, r in operation["responses"].items()}
    return {**operation, "responses": bare}


async def openapi(_: web.Request) -> web.Response:
    """Open to whoever reaches the listener, for it is the same everywhere."""
    return json_answer(document())
