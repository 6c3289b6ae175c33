"""The refusals of the server, each with what was wrong and what to do."""

from __future__ import annotations

from fedtt.messages import Code, Problem

__all__ = ["bad_token", "busy", "conflict", "stale", "unknown_device", "unknown_lease"]


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
        code=Code.BAD_SIGNATURE, detail="this device is not enrolled here", remedy="enrol with a token first"
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


def stale(why: str) -> Problem:
    return Problem(
        code=Code.STALE,
        detail=f"this update comes too late: {why}",
        remedy="drop it and check in for new work",
    )
