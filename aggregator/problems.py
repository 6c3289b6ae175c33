"""The refusals of the server, each with what was wrong and what to do."""

from __future__ import annotations

from fedtt.messages import Code, Problem

__all__ = [
    "bad_signature",
    "bad_token",
    "busy",
    "clock_skew",
    "conflict",
    "conflict_name",
    "conflict_state",
    "conflict_version",
    "forbidden",
    "internal",
    "malformed",
    "not_allowed",
    "not_found",
    "not_your_role",
    "past_end",
    "replayed",
    "revoked",
    "stale",
    "storage_failed",
    "taken_name",
    "too_large",
    "too_many",
    "unknown_device",
    "unknown_lease",
    "unknown_task",
]


def bad_signature(why: str) -> Problem:
    return Problem(code=Code.BAD_SIGNATURE, detail=why, remedy="sign the request with the device's own key")


def clock_skew(created: float, now: float) -> Problem:
    return Problem(
        code=Code.CLOCK_SKEW,
        detail=f"the request was signed {abs(created - now):.0f} s away from the server's time",
        remedy="set the clock, or sign again with the server's time in `now`",
        now=now,
    )


def replayed() -> Problem:
    return Problem(
        code=Code.REPLAYED,
        detail="the signature's nonce is not above that of an earlier request",
        remedy="sign again with a higher nonce; where the clock was set back, try again in some minutes",
    )


def revoked() -> Problem:
    return Problem(
        code=Code.REVOKED,
        detail="an operator has revoked this device's key",
        remedy="stop; whoever runs the server can say why",
    )


def bad_token() -> Problem:
    return Problem(
        code=Code.BAD_TOKEN,
        detail="the enrolment token is unknown, used up or expired",
        remedy="ask whoever runs the server for a new one",
    )


def busy(why: str) -> Problem:
    return Problem(code=Code.BUSY, detail=why, remedy="send the same again after the time in Retry-After")


def unknown_device() -> Problem:
    return Problem(
        code=Code.UNKNOWN_DEVICE, detail="this device is not enrolled here", remedy="enrol with a token first"
    )


def unknown_lease(lease_id: str) -> Problem:
    return Problem(
        code=Code.UNKNOWN_LEASE,
        detail=f"lease {lease_id[:32]} was never given to this device",
        remedy="drop the update and check in for new work",
    )


def conflict(lease_id: str) -> Problem:
    return Problem(
        code=Code.CONFLICT,
        detail=f"another update was acknowledged under lease {lease_id}",
        remedy="a lease takes one update; drop this one and check in",
    )


def internal() -> Problem:
    return Problem(
        code=Code.INTERNAL,
        detail="the server met a bug; nothing was changed",
        remedy="try again later, and report it with the server's log",
    )


def malformed(why: str) -> Problem:
    return Problem(code=Code.MALFORMED, detail=why[:500], remedy="see docs/protocol.md")


def not_found(what: str) -> Problem:
    return Problem(
        code=Code.NOT_FOUND,
        detail=f"there is no {what} here"[:500],
        remedy="see that the name is whole, and the server the right one",
    )


def past_end(range_: str, size_bytes: int) -> Problem:
    return Problem(
        code=Code.MALFORMED,
        detail=f"Range {range_[:100]!r} is no part of a file of {size_bytes} bytes",
        remedy="ask for one part, such as bytes=0-, that begins within the file",
    )


def unknown_task(name: str) -> Problem:
    return not_found(f"task {name[:100]!r}")


def not_allowed(method: str, path: str, allowed: str) -> Problem:
    return Problem(
        code=Code.NOT_FOUND, detail=f"{method[:20]} is not taken at {path}", remedy=f"use {allowed}"
    )


def storage_failed(why: str) -> Problem:
    return Problem(
        code=Code.BUSY,
        detail=(why or "the server cannot use its storage now; nothing was changed")[:500],
        remedy="send the same again once whoever runs the server has seen to it",
    )


def too_many(who: str) -> Problem:
    return Problem(
        code=Code.TOO_MANY,
        detail=f"{who} sent more requests than may come from there",
        remedy="send the same again after the time in Retry-After",
    )


def too_large(limit_bytes: int) -> Problem:
    return Problem(
        code=Code.TOO_LARGE,
        detail=f"the body is longer than the {limit_bytes} bytes this call takes",
        remedy="send what the plan asks for and nothing else",
    )


def forbidden() -> Problem:
    return Problem(
        code=Code.FORBIDDEN,
        detail="the admin token is missing or wrong",
        remedy="give the token that `fedtt serve` wrote to admin-token in its data directory, or your own",
    )


def taken_name(name: str) -> Problem:
    return Problem(
        code=Code.CONFLICT,
        detail=f"an admin token named {name!r} exists or has existed",
        remedy="choose another name: names stand in the audit log",
    )


def not_your_role(name: str, role: str, needed: str) -> Problem:
    return Problem(
        code=Code.FORBIDDEN,
        detail=f"{name!r} is a {role}, this takes a {needed}",
        remedy="ask an admin for a token with that role",
    )


def conflict_name(name: str) -> Problem:
    return Problem(
        code=Code.CONFLICT, detail=f"a task named {name!r} exists already", remedy="choose another name"
    )


def conflict_state(name: str, state: str, wanted: str) -> Problem:
    return Problem(
        code=Code.CONFLICT,
        detail=f"task {name!r} is {state} and cannot be {wanted}",
        remedy="create a task with a new name to go on",
    )


def stale(why: str) -> Problem:
    return Problem(
        code=Code.STALE,
        detail=f"this update comes too late: {why}",
        remedy="drop it and check in for new work",
    )


def conflict_version(name: str, number: int, why: str, remedy: str = "see `fedtt version list`") -> Problem:
    return Problem(
        code=Code.CONFLICT,
        detail=f"version {number} of task {name[:100]!r} is {why}",
        remedy=remedy,
    )
