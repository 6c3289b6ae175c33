"""Whether a plan's work is within its own budget and the owner's, as far as it can be told beforehand."""

from __future__ import annotations

from msgspec import Struct

from fedtt.budget import Budget
from fedtt.codec import payload_bytes
from fedtt.errors import Declined
from fedtt.layout import LiveSet
from fedtt.manifest import Manifest
from fedtt.messages import Plan
from fedtt.wire import update_limit_bytes

__all__ = [
    "Pace",
    "check_download",
    "check_memory",
    "check_time",
    "check_upload",
    "pace_key",
    "rows",
    "spent_before",
    "with_pace",
    "with_spent",
]

_PACES_KEPT = 16  #: of bundles and depths
_PRIVATE_TASKS_KEPT = 64
_FORGOTTEN = "\0"  #: no task's name: the most that was spent of one which made room
_WHOLE_FROM_S = 100.0  #: above it a fraction of a second tells nobody anything
_LASTS_S = 30 * 86400.0  #: by then a device may have become faster, or been replaced


class Pace(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How fast this device trained last."""

    row_s: float  #: of one row of a batch, everything counted
    at: float  #: Unix seconds

    def expected_s(self, count: int, now: float) -> float | None:
        """Seconds that so many rows may take; None where the pace is too old to say, or of a wrong clock."""
        return self.row_s * count if 0 <= now - self.at <= _LASTS_S else None


def pace_key(plan: Plan, depth: int) -> str:
    """Trainings of one pace: `depth` blocks of one bundle."""
    return f"{plan.bundle[:16]}:{depth}"


def with_pace(paces: dict[str, Pace], key: str, measured: Pace) -> dict[str, Pace]:
    """Those known, the longest unused first, with one more; the oldest make room."""
    others = ((name, kept) for name, kept in paces.items() if name != key)
    return dict([*others, (key, measured)][-_PACES_KEPT:])


def spent_before(spent: dict[str, float], task: str) -> float:
    """μ² of a task so far; of one that may have been forgotten, the most that any of those had spent."""
    return spent.get(task, spent.get(_FORGOTTEN, 0.0))


def with_spent(spent: dict[str, float], task: str, mu_squared: float) -> dict[str, float]:
    """Those known, the longest unused first, with one changed; the oldest make room and leave their most."""
    others = ((name, kept) for name, kept in spent.items() if name not in {task, _FORGOTTEN})
    tasks = [*others, (task, mu_squared)]
    gone = [spent.get(_FORGOTTEN, 0.0), *(kept for _, kept in tasks[:-_PRIVATE_TASKS_KEPT])]
    return {_FORGOTTEN: max(gone)} | dict(tasks[-_PRIVATE_TASKS_KEPT:])


def rows(plan: Plan, examples: int) -> int:
    """Rows of all batches of a training."""
    return plan.training.local_steps * min(plan.training.batch_size, max(1, examples))


def check_memory(plan: Plan, budget: Budget, free_mb: int | None) -> None:
    """Raise Declined where the plan may use more memory than is free, or than the owner gives."""
    needed_mb, given_mb = plan.budget.memory_mb, budget.memory_mb
    if needed_mb is None:
        return
    if given_mb is not None and needed_mb > given_mb:
        raise Declined(
            f"the task may use {needed_mb} MiB of memory, this device's owner gives {given_mb}", "memory"
        )
    if free_mb is not None and needed_mb > free_mb:
        raise Declined(f"the task may use {needed_mb} MiB of memory, {free_mb} are free here", "memory")


def check_time(limit_s: float | None, expected_s: float | None) -> None:
    """Raise Declined where a training is expected to take longer than it may."""
    if limit_s is not None and expected_s is not None and expected_s > limit_s:
        takes = f"{expected_s:.3g}" if expected_s < _WHOLE_FROM_S else f"{expected_s:.0f}"
        raise Declined(f"training would take {takes} s here, it may take {limit_s:g}", "time")


def check_download(limit_bytes: int | None, manifest: Manifest, missing_bytes: int) -> None:
    """Raise Declined where what is missing of a bundle, and a version for it, are more than may be loaded."""
    needed = missing_bytes + 4 * manifest.adapter.layout.size
    if limit_bytes is not None and missing_bytes and needed > limit_bytes:
        raise Declined(
            f"{needed} bytes of the bundle and a version are missing, {limit_bytes} may be downloaded",
            "traffic",
        )


def check_upload(limit_bytes: int | None, plan: Plan, live: LiveSet, labels: int) -> None:
    """Raise Declined where a frame of the plan's codec may be longer than what may be sent.

    labels: whose counts go with it.
    """
    if limit_bytes is None:
        return
    longest = update_limit_bytes(payload_bytes(plan.codec, live), labels)
    if longest > limit_bytes:
        raise Declined(f"an update may have {longest} bytes, {limit_bytes} may be sent", "traffic")
