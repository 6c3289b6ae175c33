"""Which round a device trains in: its branch, its seats, its factors, and who is invited."""

from __future__ import annotations

from collections.abc import Callable

from msgspec.structs import replace

from aggregator.grouping import SEEN_WITHIN_S, group_on, hierarchical, join_group
from aggregator.promised import promised
from aggregator.update_check import Estimate
from fedtt.adapter import AdapterSpec
from fedtt.manifest import Manifest, decode_manifest
from fedtt.sampling import invite, uniformly
from fedtt.server_optimiser import ServerState
from fedtt.task import RoundSpec
from fedtt.work import work_share
from storage.records import MAIN, Group, Round, RoundState, Task, Version, VersionState, group_branch
from storage.store import Transaction

__all__ = ["Rounds"]


class Rounds:
    """Where devices train and what; stateless but for a cache of manifests.

    state_of: what the fold of a version left for the next one, where schedules look at it.
    """

    def __init__(self, state_of: Callable[[Version], ServerState | None] = lambda version: None) -> None:
        self._manifests: dict[str, Manifest] = {}
        self._state_of = state_of

    def manifest(self, tx: Transaction, task: Task) -> Manifest:
        if task.bundle not in self._manifests:
            bundle = promised(tx.bundle(task.bundle), "a task's bundle")
            self._manifests[task.bundle] = decode_manifest(bundle.manifest)
        return self._manifests[task.bundle]

    def adapter(self, tx: Transaction, task: Task, rank: int | None = None) -> AdapterSpec:
        """What devices of a rank train; None for the bundle's own."""
        adapter = self.manifest(tx, task).adapter
        return adapter if rank is None else adapter.at_rank(rank)

    def runtimes(self, tx: Transaction, task: Task) -> tuple[str, ...]:
        return tuple(self.manifest(tx, task).graphs)

    def labels(self, tx: Transaction, task: Task) -> int:
        """Of which devices are asked for their counts; 0 where they are not."""
        method = hierarchical(task)
        asked = method is not None and method.label_epsilon is not None
        return len(self.manifest(tx, task).labels) if asked else 0

    def estimate(self, tx: Transaction, task: Task, round_: Round) -> Estimate | None:
        """How counts of labels are estimated from a round's updates; None where they are not."""
        method = hierarchical(task)
        if method is None or method.label_source != "updates":
            return None
        return Estimate(len(self.manifest(tx, task).labels), task.spec.training_in(round_.number))

    def work(self, tx: Transaction, task: Task, live: tuple[int, ...]) -> float:
        """Of a training, over that at full depth, where depths differ."""
        return work_share(self.adapter(tx, task), live) if hierarchical(task) else 1.0

    def branch_of(self, tx: Transaction, task: Task, device_id: str) -> str:
        """Where a device trains; one that is in no group joins one."""
        if not task.groups:
            return MAIN
        number = tx.group_of(task.id, device_id)
        if number not in {group.number for group in task.groups}:
            number = join_group(tx, self.adapter(tx, task), task, device_id)
            tx.put_members(task.id, {device_id: number})
        return group_branch(number)

    @staticmethod
    def seats(task: Task, branch: str) -> RoundSpec:
        """How rounds on a branch are held: with the seats of its group, or all of the task's."""
        group = group_on(task, branch) if task.groups else None
        if group is None:
            return task.spec.rounds
        return replace(task.spec.rounds, cohort=group.cohort, buffer=group.buffer, quorum=group.quorum)

    def ensure_round(self, tx: Transaction, now: float, task: Task, branch: str = MAIN) -> Round | None:
        """The open round of an active task, opening one where the last has ended.

        None while it is folding, while a group waits for the others, and while the newest version is judged.
        """
        last = tx.latest_round(task.id, branch)
        if last is not None and last.state is RoundState.OPEN:
            return last
        group = group_on(task, branch)
        waits = group.waits if group else bool(task.groups)
        if waits or (last is not None and last.state is RoundState.FOLDING):
            return None
        base = promised(tx.latest_version(task.id, branch), "a branch's first version")
        if base.state is VersionState.CANDIDATE:
            return None
        number = self.newest_round(tx, task) + 1
        invited, drawn_from = self._drawn(tx, now, task, branch, number)
        round_ = Round(
            task_id=task.id,
            branch=branch,
            number=number,
            version_number=base.number,
            live=self.live(tx, task, group, number, base),
            invited=invited,
            state=RoundState.OPEN,
            opened_at=now,
            deadline_at=None,
            closed_at=None,
            reason="",
            drawn_from=drawn_from,
        )
        tx.put_round(round_)
        return round_

    @staticmethod
    def newest_round(tx: Transaction, task: Task) -> int:
        """The highest number of a round; groups that are no more had lower ones than the main branch."""
        branches = (MAIN, *(group.branch for group in task.groups))
        rounds = (tx.latest_round(task.id, branch) for branch in branches)
        return max((round_.number for round_ in rounds if round_), default=0)

    def live(
        self, tx: Transaction, task: Task, group: Group | None, number: int, base: Version
    ) -> tuple[int, ...]:
        adapter, method = self.adapter(tx, task), hierarchical(task)
        if group is not None and method is not None:
            return method.live_at(adapter, group.depth).indices
        return task.spec.live(adapter, number, self._state_of(base)).indices

    def _drawn(
        self, tx: Transaction, now: float, task: Task, branch: str, round_number: int
    ) -> tuple[tuple[str, ...], int]:
        """The cohort, of devices of the branch seen lately that can do the work, and how many these are."""
        spec, seen_since, runtimes = task.spec, now - SEEN_WITHIN_S, self.runtimes(tx, task)
        few, seats, group = spec.min_examples, self.seats(task, branch).cohort, group_on(task, branch)
        needed_mb = spec.budget.memory_mb or 0
        if spec.sampling.is_plain:
            devices = tx.active_devices(
                seen_since=seen_since,
                min_examples=few,
                runtimes=runtimes,
                memory_mb=needed_mb,
                member_of=(task.id, group.number) if group else None,
            )
            return uniformly(task.draw_key, round_number, devices, seats), len(devices)
        candidates = tx.candidates(
            task.id,
            seen_since=seen_since,
            min_examples=few,
            runtimes=runtimes,
            memory_mb=needed_mb,
            group=group.number if group else None,
        )
        return invite(spec.sampling, task.draw_key, round_number, candidates, seats), len(candidates)
