"""A task's devices in groups: who belongs where, with how many seats, how often and how deep they train.

All is computed beside a sum, from the ledger alone, and published with the version that the sum makes: the
same ledger gives the same groups.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from msgspec import Struct

from aggregator.promised import promised
from fedtt.adapter import AdapterSpec
from fedtt.algorithms.hier_fedlora import Hierarchical
from fedtt.algorithms.near_iid import Member, near_iid, place
from fedtt.algorithms.pace import (
    PRIOR_AGREEMENT,
    PRIOR_EXPONENT,
    Bounds,
    Pace,
    Progress,
    choose_paces,
    fitted_exponent,
)
from fedtt.codec import CodecSpec, payload_bytes
from fedtt.label_counts import decode_label_counts
from fedtt.task import RoundSpec
from fedtt.work import depth_share
from storage.records import MAIN, Group, Participation, Task, UpdateState, Version
from storage.store import Transaction

__all__ = [
    "SEEN_WITHIN_S",
    "Grouping",
    "changes_of",
    "form_groups",
    "group_on",
    "hierarchical",
    "join_group",
    "next_period",
    "seats",
    "waiting_updates",
]

SEEN_WITHIN_S = 7 * 86400.0  #: devices seen in this time are sampled


class Grouping(Struct, frozen=True, kw_only=True):
    """The groups of the next period; their branches begin where the version they come with stands."""

    groups: tuple[Group, ...]
    members: Mapping[str, int] = {}  #: devices that are put into a group now; others stay where they are
    report: dict[str, float] = {}


def hierarchical(task: Task) -> Hierarchical | None:
    """The method of a task whose devices train in groups."""
    return task.spec.method if isinstance(task.spec.method, Hierarchical) else None


def group_on(task: Task, branch: str) -> Group | None:
    return next((group for group in task.groups if group.branch == branch), None)


def seats(rounds: RoundSpec, sizes: Sequence[int], least: int) -> list[tuple[int, int, int]]:
    """(cohort, buffer, quorum) of each group: its part of the task's by size, at least `least` of each.

    Cohorts add up to the task's, by the largest remainder.
    """
    free, total = rounds.cohort - least * len(sizes), sum(sizes)
    exact = [free * size / total for size in sizes]
    cohorts = [least + int(part) for part in exact]
    by_remainder = sorted(range(len(sizes)), key=lambda g: (int(exact[g]) - exact[g], g))
    for g in by_remainder[: rounds.cohort - sum(cohorts)]:
        cohorts[g] += 1
    found = []
    for cohort in cohorts:
        buffer = min(cohort, max(least, -(-cohort * rounds.closes_at // rounds.cohort)))
        found.append((cohort, buffer, min(buffer, max(least, -(-cohort * rounds.quorum // rounds.cohort)))))
    return found


def form_groups(tx: Transaction, adapter: AdapterSpec, task: Task, report: Mapping[str, float]) -> Grouping:
    """Groups of all devices measured so far; of none where none of them is active any more.

    report: of the newest version, with what was measured when groups were put together.
    """
    method = promised(hierarchical(task), "a method with groups")
    parts = tx.participants(task.id)
    count = min(method.groups, len(parts))
    if not count:
        return Grouping(groups=())
    known = _members(parts, adapter)
    chosen = near_iid(known, count, method.time_weight)
    members = {part.device_id: 1 + group for part, group in zip(parts, chosen, strict=True)}
    sizes = Counter((tx.members(task.id) | members).values())
    split = seats(task.spec.rounds, [sizes[number] for number in range(1, count + 1)], task.spec.fold.least)
    default_s = _mean([m.time_s for m in known if m.time_s is not None]) or task.spec.rounds.deadline_s
    times = [
        [m.time_s for m, g in zip(known, chosen, strict=True) if g == i and m.time_s] for i in range(count)
    ]
    new = [
        Progress(round_s=_mean(of_group) or default_s, cohort=cohort)
        for of_group, (cohort, _, _) in zip(times, split, strict=True)
    ]
    return Grouping(
        groups=_groups(
            range(1, count + 1), new, split, _paces(method, adapter, task.spec.codec, new, report)
        ),
        members=members,
        report=dict(report),
    )


def next_period(
    tx: Transaction, adapter: AdapterSpec, task: Task, base: Version, agreement: float, at: float
) -> Grouping:
    """The same groups with seats by their sizes now, paces revised; those without a device are left out.

    Devices that took part in the period are placed anew, by what they have shown: so those that joined a
    group unmeasured come to where they fit.
    base: the newest version, from which the period that ends now began. at: the time of its end.
    """
    method = promised(hierarchical(task), "a method with groups")
    seen_lately = tx.members(task.id, seen_since=at - SEEN_WITHIN_S)
    populated = [g.number for g in task.groups if g.number in seen_lately.values()]
    moved = _placed_anew(tx, adapter, task, populated, promised(base.round_number, "a warm-up's round"))
    sizes = Counter(moved.get(device, number) for device, number in seen_lately.items())
    alive = [group for group in task.groups if sizes[group.number]] or list(task.groups)
    split = seats(task.spec.rounds, [max(1, sizes[g.number]) for g in alive], task.spec.fold.least)
    seen = [_progress(tx, adapter, task, group, base) for group in alive]
    exponent = fitted_exponent(
        seen, adapter.depth, agreement, base.report.get("depth_exponent", PRIOR_EXPONENT)
    )
    report = {"agreement": agreement, "depth_exponent": exponent}
    now = [
        Progress(round_s=p.round_s, cohort=c, pace=p.pace, loss_drop=p.loss_drop)
        for p, (c, _, _) in zip(seen, split, strict=True)
    ]
    paces = _paces(method, adapter, task.spec.codec, now, report)
    numbers = [group.number for group in alive]
    return Grouping(groups=_groups(numbers, now, split, paces), members=moved, report=report)


def _placed_anew(
    tx: Transaction, adapter: AdapterSpec, task: Task, numbers: Sequence[int], since: int
) -> dict[str, int]:
    """The one of the groups `numbers` for each of their devices that took part after the round `since`."""
    belongs = tx.members(task.id)
    parts = [part for part in tx.participants(task.id) if belongs.get(part.device_id) in numbers]
    shown = [part for part in parts if part.last_round > since]
    others = [part for part in parts if part.last_round <= since]
    if not shown:
        return {}
    chosen = _placed(shown, others, numbers, belongs, adapter, task)
    return {part.device_id: number for part, number in zip(shown, chosen, strict=True)}


def join_group(tx: Transaction, adapter: AdapterSpec, task: Task, device_id: str) -> int:
    """The group of a device that is in none yet: where it is missed most.

    One of which nothing was measured joins the slowest, whom it cannot hold up, until the end of the first
    period in which it takes part.
    """
    numbers = [group.number for group in task.groups]
    part = tx.participation(task.id, device_id)
    if part is None or (part.duration_s is None and part.label_counts is None):
        return numbers[-1]
    belongs = tx.members(task.id)
    parts = [p for p in tx.participants(task.id) if belongs.get(p.device_id) in numbers]
    return _placed([part], parts, numbers, belongs, adapter, task)[0]


def _placed(
    newcomers: Sequence[Participation],
    parts: Sequence[Participation],
    numbers: Sequence[int],
    belongs: Mapping[str, int],
    adapter: AdapterSpec,
    task: Task,
) -> list[int]:
    """The one of the groups `numbers` that each newcomer fits, where `parts` stay where they belong."""
    method = promised(hierarchical(task), "a method with groups")
    known = _members([*parts, *newcomers], adapter)
    groups = [numbers.index(belongs[part.device_id]) for part in parts]
    chosen = place(known[len(parts) :], known[: len(parts)], groups, len(numbers), method.time_weight)
    return [numbers[group] for group in chosen]


def changes_of(tx: Transaction, task: Task, group: Group) -> list[Version]:
    """The versions a group has made since the last global fold, in order."""
    newest = promised(tx.latest_version(task.id, group.branch), "a group's version").number
    numbers = range(group.version_number + 1, newest + 1)
    return [promised(tx.version(task.id, group.branch, n), "a group's version") for n in numbers]


def waiting_updates(tx: Transaction, task: Task) -> int:
    """Updates in the newest rounds of a task, on all its branches, that are not folded yet."""
    branches = (MAIN, *(group.branch for group in task.groups))
    rounds = [round_ for branch in branches if (round_ := tx.latest_round(task.id, branch))]
    return sum(tx.count_updates(task.id, r.branch, r.number, UpdateState.ACCEPTED) for r in rounds)


def _members(parts: Sequence[Participation], adapter: AdapterSpec) -> list[Member]:
    classes = adapter.head.labels if adapter.head else 0
    return [
        Member(
            labels=None if p.label_counts is None else decode_label_counts(p.label_counts, classes),
            time_s=p.full_s,
        )
        for p in parts
    ]


def _progress(tx: Transaction, adapter: AdapterSpec, task: Task, group: Group, base: Version) -> Progress:
    """What a group has shown in the period that began with the version `base`."""
    made = changes_of(tx, task, group)
    last = tx.latest_round(task.id, group.branch)
    drop = None
    if made and made[0].loss_first is not None and made[-1].loss_last is not None:
        # To the last local steps, of models that are not averaged yet: the next first steps are those of the
        # sum of all groups, so nothing shows what a group's own last fold was worth, and one of τ = 1 has no
        # other. It is taken in every group alike, and only how they compare counts.
        drop = made[0].loss_first - made[-1].loss_last
    round_s = group.round_s
    if last is not None and last.closed_at is not None and group.ended:
        took_s = (last.closed_at - base.created_at) / group.ended
        round_s = (round_s + max(took_s, 1e-3) / depth_share(group.depth, adapter.depth)) / 2
    pace = Pace(frequency=group.frequency, depth=group.depth)
    return Progress(round_s=round_s, cohort=group.cohort, pace=pace, loss_drop=drop)


def _paces(
    method: Hierarchical,
    adapter: AdapterSpec,
    codec: CodecSpec,
    groups: Sequence[Progress],
    report: Mapping[str, float],
) -> tuple[Pace, ...]:
    depths = range(1, adapter.depth + 1)
    bounds = Bounds(
        max_frequency=method.max_frequency,
        min_depth=method.min_depth,
        payload_bytes=tuple(payload_bytes(codec, method.live_at(adapter, depth)) for depth in depths),
        bytes_weight=method.bytes_weight,
    )
    agreement = report.get("agreement", PRIOR_AGREEMENT)
    return choose_paces(groups, bounds, agreement, report.get("depth_exponent", PRIOR_EXPONENT))


def _groups(
    numbers: Sequence[int],
    progress: Sequence[Progress],
    split: Sequence[tuple[int, int, int]],
    paces: Sequence[Pace],
) -> tuple[Group, ...]:
    return tuple(
        Group(
            number=number,
            version_number=0,  # given when the version they begin from is published
            frequency=pace.frequency,
            depth=pace.depth,
            cohort=cohort,
            buffer=buffer,
            quorum=quorum,
            round_s=seen.round_s,
        )
        for number, seen, (cohort, buffer, quorum), pace in zip(numbers, progress, split, paces, strict=True)
    )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
