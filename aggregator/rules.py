"""The decisions of the protocol as pure functions: no store, no clock, no randomness of their own.

One rule covers synchronous and asynchronous training: a round gives at most `cohort` leases on its base
version; it closes when `buffer` acceptable updates are in, or at its deadline with at least `quorum`, and
is abandoned below that; an update is acceptable while its base is at most `max_staleness` versions old.
With max_staleness = 0 it must also come from the round that is open, else from one that trained the same
factors in the same coordinates.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from enum import Enum

from msgspec.structs import replace

from fedtt.rng import Purpose, uniform_at
from fedtt.task import RoundSpec, TaskSpec
from storage.records import Lease, LeaseState, Round, RoundState

__all__ = [
    "Due",
    "due",
    "foreseen_s",
    "free_seats",
    "idle_retry_s",
    "pace_s",
    "refusal",
    "retry_after_s",
    "seat_open_to_all",
    "with_deadline",
]

_GRACE = 0.25  #: of the deadline, for which seats are kept for the invited
_LATEST_S = 3600.0  #: that a device is told to wait for a round that is foreseen; it hears of no other task


class Due(Enum):
    """What a round's time has come for."""

    NOTHING = "nothing"
    FOLD = "fold"
    ABANDON = "abandon"


def due(spec: RoundSpec, round_: Round, accepted: int, now: float) -> Due:
    """Whether an open round closes now; `accepted` counts its acknowledged updates."""
    if round_.state is not RoundState.OPEN:
        return Due.NOTHING
    if accepted >= spec.closes_at:
        return Due.FOLD
    if round_.deadline_at is None or now < round_.deadline_at:
        return Due.NOTHING
    return Due.FOLD if accepted >= spec.quorum else Due.ABANDON


def with_deadline(spec: RoundSpec, round_: Round, now: float) -> Round:
    """The round, whose time begins to run now; or when it opened, by a clock that was set back since."""
    return replace(round_, deadline_at=max(now, round_.opened_at) + spec.deadline_s)


def free_seats(spec: RoundSpec, leases: Mapping[LeaseState, int]) -> int:
    """Leases a round may still give; one that was given back frees its seat."""
    return spec.cohort - sum(leases.values()) + leases.get(LeaseState.FAILED, 0)


def seat_open_to_all(spec: RoundSpec, round_: Round, now: float) -> bool:
    """Whether devices that were not sampled may take a seat.

    They may where the sample was smaller than the cohort (a young population), and later where the
    invited have not come within a quarter of the deadline.
    """
    return len(round_.invited) < spec.cohort or now >= round_.opened_at + _GRACE * spec.deadline_s


def refusal(task: TaskSpec, granted: Round, current: Round, lease: Lease) -> str | None:
    """Why an update under this lease can no longer be taken, or None where it can.

    granted: the lease's own round; current: the one whose fold the update would join.
    """
    spec = task.rounds
    if lease.state is LeaseState.FAILED:
        return "the lease was given back"
    if current.state is not RoundState.OPEN:
        return "the task takes no more updates"
    if current.version_number - lease.version_number > spec.max_staleness:
        return f"it was trained from version {lease.version_number}, now {current.version_number} is current"
    if spec.max_staleness == 0 and lease.round_number != current.number:
        return f"its round {lease.round_number} has closed, now round {current.number} is open"
    if granted.live != current.live:
        return f"its round {granted.number} trained other factors than round {current.number}, which is open"
    if not task.method.same_gauge(granted.number, current.number):
        return f"what surrounds its factors has been trained since its round {granted.number}"
    return None


def retry_after_s(
    spec: RoundSpec, seed: int, round_number: int, device_id: str, *, mean_s: float = math.inf
) -> float:
    """When this device asks again: between half and one and a half of `retry_s`, so that herds disperse.

    mean_s: of what is waited for, where that is known to be sooner.
    """
    return _spread(min(mean_s, spec.retry_s), seed, round_number, device_id)


def pace_s(spec: RoundSpec, last: Round | None, current: Round) -> float | None:
    """Seconds from one round's opening to the next's, or None where that cannot be foreseen.

    last: the round before the current one. Rounds are taken to go on as these two followed each other, as
    long as the invited come by themselves: not where the last was still open when its seats were open to
    all, so that there everybody goes on asking.
    """
    if last is None or last.state is not RoundState.FOLDED or last.closed_at is None:
        return None
    if last.closed_at >= last.opened_at + _GRACE * spec.deadline_s:
        return None
    return current.opened_at - last.opened_at


def foreseen_s(
    task: TaskSpec, round_s: float, current: Round, turn: int, now: float, device_id: str
) -> float:
    """When a device asks again whose turn is round `turn`; 0 where it asks as all others do.

    Rounds may become quicker than `round_s`, so it is after half to three quarters of the time, and from two
    rounds before its turn it asks as others. Past its last round a task needs nobody.
    """
    last = current.number + task.rounds.count - current.version_number
    left_s = (min(turn, last) - current.number) * round_s - (now - current.opened_at)
    if left_s < 2 * round_s:
        return 0.0
    return min(_spread(0.25 * left_s, task.seed, current.number, device_id, least=2.0), _LATEST_S)


def idle_retry_s(mean_s: float, now: float, device_id: str) -> float:
    """The same where there is no round to draw by: devices that came together do not come back together."""
    return _spread(mean_s, 0, int(now), device_id)


def _spread(unit_s: float, seed: int, number: int, device_id: str, *, least: float = 0.5) -> float:
    """Between `least` units and one more."""
    return unit_s * (least + uniform_at(seed, Purpose.BACKOFF, number, int(device_id[:16], 16)))
