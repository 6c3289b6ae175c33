"""What each call of the two listeners takes and answers: the tables behind the OpenAPI document."""

from __future__ import annotations

from typing import Annotated, Any

from msgspec import Meta, Struct

from aggregator import answers as row
from aggregator.enrolment import TokenTerms
from aggregator.people import AdminTokenTerms
from fedtt.manifest import Manifest
from fedtt.messages import (
    DIFFERENCE_MEDIA_TYPE,
    AsTold,
    CheckIn,
    CheckInAnswer,
    Code,
    Enroll,
    Enrolled,
    Failure,
    Receipt,
    Verdict,
)
from fedtt.names import Sha256

__all__ = ["ADMIN_CALLS", "BINARY", "DEVICE_CALLS", "FILE_PARTS", "JSON", "Call"]

BINARY, JSON, TEXT, HTML = "application/octet-stream", "application/json", "text/plain", "text/html"
Media = tuple[str, ...]  #: media types of what is no message: a file, a page, an update frame


class Call(Struct, frozen=True, kw_only=True):
    """One call as the document tells it; a body is a type, in the listener's own format, or raw bytes."""

    about: str
    takes: Any = None  #: a type, Media, or None for no body
    gives: Any = None
    status: int = 200
    refuses: tuple[Code, ...] = ()  #: beyond those that every call of its listener may answer with
    query: dict[str, Any] = {}  #: parameter -> its type; a type that admits None may be left out
    signed: bool = True  #: or, on the admin listener, with a token
    ranged: bool = False  #: whether it serves a file in parts


_LATE = (Code.UNKNOWN_LEASE, Code.CONFLICT, Code.STALE, Code.TOO_LARGE)
_LONG = (Code.TOO_LARGE,)
_CHANGES = (Code.CONFLICT,)
FILE_PARTS = (206, 416)

DEVICE_CALLS: dict[str, Call] = {
    "GET /healthz": Call(about="Whether the server is there", gives=dict[str, bool], signed=False),
    "GET /readyz": Call(about="Whether it takes new devices", gives=dict[str, bool], signed=False),
    "POST /v1/enroll": Call(
        about="Make a key known", takes=Enroll, gives=Enrolled, refuses=(Code.BAD_TOKEN, *_LONG)
    ),
    "POST /v1/check-in": Call(
        about="Ask for work", takes=CheckIn | AsTold, gives=CheckInAnswer, refuses=_LONG
    ),
    "GET /v1/bundles/{sha256}/{file}": Call(
        about="One file of a bundle", gives=(BINARY, JSON), ranged=True, refuses=_LONG
    ),
    "GET /v1/versions/{sha256}": Call(
        about="The factors to start from, whole or as the difference from those held",
        gives=(BINARY, DIFFERENCE_MEDIA_TYPE),
        query={"from": Sha256 | None},
        ranged=True,
        refuses=_LONG,
    ),
    "PUT /v1/leases/{lease}/update": Call(
        about="Send an update; the same bytes again get the same receipt",
        takes=(BINARY,),
        gives=Receipt,
        refuses=(*_LATE, Code.WRONG_LAYOUT, Code.NOT_FINITE),
    ),
    "GET /v1/leases/{lease}": Call(about="What has become of an update", gives=Receipt, refuses=_LATE),
    "POST /v1/leases/{lease}/failure": Call(
        about="Give a lease back", takes=Failure, status=204, refuses=_LATE
    ),
    "POST /v1/leases/{lease}/verdict": Call(
        about="What a version came to on the device's own examples", takes=Verdict, status=204, refuses=_LATE
    ),
    "POST /v1/device/leave": Call(about="Take no further part", status=204, refuses=_LONG),
    "DELETE /v1/device": Call(
        about="Leave, and have the server erase what it knows", status=204, refuses=_LONG
    ),
}

_ADMIN = "/v1/admin"
_TASK = f"{_ADMIN}/tasks/{{task}}"
_VERSION = f"{_TASK}/versions/{{number}}"
ADMIN_CALLS: dict[str, Call] = {
    "GET /": Call(about="The dashboard", gives=(HTML,), signed=False),
    "GET /openapi.json": Call(about="This document", gives=dict[str, Any], signed=False),
    "GET /metrics": Call(about="Metrics for Prometheus", gives=(TEXT,)),
    f"HEAD {_ADMIN}/blobs/{{sha256}}": Call(about="Whether a file is stored"),
    f"PUT {_ADMIN}/blobs/{{sha256}}": Call(
        about="Store one file of a bundle", takes=(BINARY,), gives=row.SentBlob, status=201, refuses=_LONG
    ),
    f"POST {_ADMIN}/bundles": Call(
        about="Register a bundle whose files are all stored: its manifest.json as it is",
        takes=Manifest,
        gives=row.SentBundle,
        status=201,
        refuses=_LONG,
    ),
    f"GET {_ADMIN}/bundles/{{sha256}}/{{file}}": Call(
        about="One file of a bundle", gives=(BINARY, JSON), ranged=True
    ),
    f"GET {_ADMIN}/tasks": Call(about="All tasks", gives=list[row.TaskRow]),
    f"POST {_ADMIN}/tasks": Call(
        about="Open a task: its file as it is",
        takes=("application/toml",),
        gives=row.TaskRow,
        status=201,
        query={"bundle": Sha256},
        refuses=(*_CHANGES, *_LONG),
    ),
    f"GET {_TASK}": Call(about="One task and its settings", gives=row.TaskDetail),
    f"POST {_TASK}/pause": Call(about="Give no new leases", gives=row.TaskRow, refuses=_CHANGES),
    f"POST {_TASK}/resume": Call(about="Give leases again", gives=row.TaskRow, refuses=_CHANGES),
    f"POST {_TASK}/stop": Call(about="End a task for good", gives=row.TaskRow, refuses=_CHANGES),
    f"GET {_TASK}/rounds": Call(
        about="Its newest rounds, newest first",
        gives=list[row.RoundRow],
        query={"limit": Annotated[int, Meta(ge=1, le=1000)] | None},
    ),
    f"GET {_TASK}/versions": Call(about="Its versions, oldest first", gives=list[row.VersionRow]),
    f"GET {_VERSION}/{{file}}": Call(
        about="A version as people use it: its factors as safetensors, or its config", gives=(BINARY,)
    ),
    f"POST {_VERSION}/release": Call(
        about="Let devices train from it", gives=row.VersionRow, refuses=_CHANGES
    ),
    f"POST {_VERSION}/hold": Call(
        about="Let no device train from it", gives=row.VersionRow, refuses=_CHANGES
    ),
    f"POST {_VERSION}/rollback": Call(
        about="Publish it again under the next number", gives=row.VersionRow, refuses=_CHANGES
    ),
    f"POST {_VERSION}/verdict": Call(
        about="Release or hold it by what it came to",
        takes=Verdict,
        gives=row.VersionRow,
        refuses=(*_CHANGES, *_LONG),
    ),
    f"GET {_ADMIN}/devices": Call(
        about="Enrolled devices, a page at a time",
        gives=list[row.DeviceRow],
        query={"after": Annotated[str, Meta(description="id of the last device already seen")] | None},
    ),
    f"POST {_ADMIN}/devices/{{device}}/revoke": Call(
        about="Take a device's key out for good", gives=row.RevokedDevice, refuses=_CHANGES
    ),
    f"POST {_ADMIN}/tokens": Call(
        about="Make an enrolment token", takes=TokenTerms, gives=row.NewToken, status=201, refuses=_LONG
    ),
    f"POST {_ADMIN}/tokens/{{sha256}}/revoke": Call(
        about="Let no device enrol with it any more", gives=row.RevokedToken
    ),
    f"GET {_ADMIN}/admin-tokens": Call(about="People's tokens", gives=list[row.AdminTokenRow]),
    f"POST {_ADMIN}/admin-tokens": Call(
        about="Make a token for a person",
        takes=AdminTokenTerms,
        gives=row.NewAdminToken,
        status=201,
        refuses=(*_CHANGES, *_LONG),
    ),
    f"POST {_ADMIN}/admin-tokens/{{name}}/revoke": Call(about="Take one back", gives=row.AdminTokenRow),
    f"GET {_ADMIN}/audit": Call(
        about="What people changed, oldest first",
        gives=list[row.AuditRow],
        query={"after": Annotated[int, Meta(ge=0, lt=10**15)] | None},
    ),
    f"GET {_ADMIN}/population": Call(about="How many devices there are", gives=row.Population),
    f"GET {_ADMIN}/activity": Call(about="What this process has done", gives=row.ActivityRow),
}
