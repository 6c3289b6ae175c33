"""How rounds and tasks move on: open, claim, fold, abandon, finish, pause, stop.

A fold is three steps. `claim` fixes the set of updates in one transaction (the round is FOLDING and takes
no more). The sum is computed outside any transaction, in ledger order, so that it gives the same bits each
time. `publish` inserts the version and settles the updates in one short transaction; the version's key is
the fence against a second fold. A crash after `claim` finds the round still FOLDING and sums again.

Where devices train in groups, each group's branch has rounds of its own. When all groups have held theirs, a
round without leases is claimed on the main branch at once; its sum puts their changes together, and its
version is published on the main branch and, under their next numbers, on all of theirs.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from msgspec import Struct
from msgspec.structs import replace

from aggregator import rules
from aggregator.grouping import Grouping, changes_of
from aggregator.promised import promised
from aggregator.rounds import Rounds
from fedtt.task import TaskSpec
from storage.records import (
    MAIN,
    Round,
    RoundState,
    Task,
    TaskState,
    UpdateState,
    Version,
    VersionState,
    rank_branch,
)
from storage.store import Transaction

__all__ = ["Fold", "Lifecycle"]


class Fold(Struct, frozen=True, kw_only=True):
    """The outcome of a sum, ready to be published."""

    task_id: int
    round_number: int
    sha256: str  #: of the new factors, which lie in the blob store already
    updates: tuple[str, ...]  #: leases of the updates it settles, in ledger order
    examples: int
    loss_first: float
    loss_last: float
    variants: dict[int, str]  #: rank -> sha256 of the same factors at that rank
    server_state: str  #: sha256 of what the next fold needs of this one
    report: dict[str, float]  #: what the method measured
    branch: str = MAIN  #: of its round
    group_updates: int = 0  #: in the groups' versions, which are settled already
    merged: tuple[str, ...] = ()  #: sha256 of the groups' versions it was made from, beside its base
    grouping: Grouping | None = None  #: of the period that begins with it

    @property
    def count(self) -> int:
        """The updates that the version is made of."""
        return len(self.updates) + self.group_updates


class Lifecycle(Rounds):
    """Moves rounds and tasks on."""

    def advance(self, tx: Transaction, now: float) -> list[Round]:
        """Expire leases, close rounds whose time has come; returns the rounds that wait for their sum."""
        tx.expire_leases(now)
        folding = []
        for task in tx.tasks():
            self._hurry(tx, now, task)
            for branch in self._branches(task):
                known = promised(tx.task_by_id(task.id), "a task") if task.groups else task
                folding += self._close(tx, now, known, branch)
        return folding

    def claimed(self, tx: Transaction) -> list[Round]:
        """The rounds that wait for their sums."""
        newest = [tx.latest_round(task.id, branch) for task in tx.tasks() for branch in self._branches(task)]
        return [round_ for round_ in newest if round_ is not None and round_.state is RoundState.FOLDING]

    @staticmethod
    def _branches(task: Task) -> tuple[str, ...]:
        """Those with rounds; the main branch last, whose round may follow from the others'."""
        return (*(group.branch for group in task.groups), MAIN)

    def _close(self, tx: Transaction, now: float, task: Task, branch: str) -> list[Round]:
        """The newest round of a branch where it waits for its sum, now or already."""
        round_ = tx.latest_round(task.id, branch)
        if round_ is None:
            return []
        rounds = self.seats(task, branch)
        accepted = tx.count_updates(task.id, branch, round_.number, UpdateState.ACCEPTED)
        match rules.due(rounds, round_, accepted, now):
            case rules.Due.FOLD:
                round_ = replace(round_, state=RoundState.FOLDING)
                tx.put_round(round_)
            case rules.Due.ABANDON:
                why = f"{accepted} of at least {rounds.quorum} updates came by the deadline"
                self._go_on_without(tx, now, task, round_, why)
            case rules.Due.NOTHING:
                pass
        return [round_] if round_.state is RoundState.FOLDING else []

    def _hurry(self, tx: Transaction, now: float, task: Task) -> None:
        """A group for which others wait has a round with a deadline, also before its first lease."""
        if task.state is not TaskState.ACTIVE or not any(group.waits for group in task.groups):
            return
        for group in task.groups:
            round_ = self.ensure_round(tx, now, task, group.branch)
            if round_ is not None and round_.deadline_at is None:
                tx.put_round(rules.with_deadline(task.spec.rounds, round_, now))

    def give_up_fold(self, tx: Transaction, now: float, claimed: Round, why: str) -> None:
        """Abandon a round whose sum makes no version, so that it does not wait for ever."""
        round_ = tx.round(claimed.task_id, claimed.branch, claimed.number)
        task = promised(tx.task_by_id(claimed.task_id), "a round's task")
        if round_ is not None and round_.state is RoundState.FOLDING:
            self._go_on_without(tx, now, task, round_, why)

    def _go_on_without(self, tx: Transaction, now: float, task: Task, round_: Round, why: str) -> None:
        self._abandon(tx, now, round_, why)
        task = self._give_up(tx, task)
        if round_.branch != MAIN:
            task = self._ended(tx, now, task, round_.branch)
        elif task.groups:
            task = self._begin_again(tx, now, task, round_.number)
        self._open_next(tx, now, task)

    def _abandon(self, tx: Transaction, now: float, round_: Round, why: str) -> None:
        tx.put_round(replace(round_, state=RoundState.ABANDONED, closed_at=now, reason=why))
        waiting = tx.updates(round_.task_id, round_.branch, round_.number, UpdateState.ACCEPTED)
        leases = [update.lease_id for update in waiting]
        reason = f"round {round_.number} was abandoned: {why}"
        tx.settle(leases, UpdateState.DISCARDED, reason=reason)

    def _open_next(self, tx: Transaction, now: float, task: Task) -> None:
        if task.state is TaskState.ACTIVE:
            for branch in self._branches(task):
                self.ensure_round(tx, now, task, branch)

    def _give_up(self, tx: Transaction, task: Task) -> Task:
        """Pause an active task whose last rounds were all abandoned."""
        limit = task.spec.rounds.give_up_after
        newest = tx.rounds(task.id, limit=limit + len(task.groups))
        last = [r for r in newest if r.number > task.resumed_after and r.state is not RoundState.OPEN][:limit]
        failed = len(last) == limit and all(r.state is RoundState.ABANDONED for r in last)
        if failed and task.state is TaskState.ACTIVE:
            reason = f"{limit} rounds in a row were abandoned, the last because {last[0].reason}"
            task = replace(task, state=TaskState.PAUSED, reason=reason)
            tx.put_task(task)
        return task

    def publish(self, tx: Transaction, now: float, fold: Fold) -> Version | None:
        """Insert version n+1 and settle what it is made of; None where another has done so already."""
        round_ = tx.round(fold.task_id, fold.branch, fold.round_number)
        task = tx.task_by_id(fold.task_id)
        if round_ is None or task is None or round_.state is not RoundState.FOLDING:
            return None
        base = promised(tx.version(fold.task_id, fold.branch, round_.version_number), "a round's version")
        version = Version(
            task_id=task.id,
            branch=fold.branch,
            number=base.number + 1,
            sha256=fold.sha256,
            parents=(base.sha256, *fold.merged),
            gauge="plain",
            state=VersionState.CANDIDATE if task.spec.evaluation else VersionState.RELEASED,
            created_at=now,
            round_number=round_.number,
            updates=fold.count,
            examples=fold.examples,
            loss_first=fold.loss_first,
            loss_last=fold.loss_last,
            server_state=fold.server_state,
            report=fold.report,
        )
        self._add(tx, version, fold.variants)
        tx.settle(fold.updates, UpdateState.FOLDED, folded_into=version.number)
        tx.put_round(replace(round_, state=RoundState.FOLDED, closed_at=now))
        if version.state is VersionState.RELEASED:
            self._go_on(tx, now, task, version, fold.grouping)
        return version

    def _go_on(
        self, tx: Transaction, now: float, task: Task, version: Version, grouping: Grouping | None
    ) -> None:
        """What follows from a version: the end of the task, a new period of its groups, the next round."""
        if version.branch != MAIN:
            task = self._ended(tx, now, task, version.branch)
        elif version.number >= task.spec.rounds.count:
            if task.state in {TaskState.ACTIVE, TaskState.PAUSED}:
                task = replace(task, state=TaskState.FINISHED, reason="all rounds are folded")
                tx.put_task(task)
        elif grouping is not None:
            round_number = promised(version.round_number, "a version's round")
            task = self._begin_period(tx, now, task, version, round_number, grouping)
        self._open_next(tx, now, task)

    # groups

    def _ended(self, tx: Transaction, now: float, task: Task, branch: str) -> Task:
        """Count a group's round that is over; the last of all claims what is to be put together."""
        groups = tuple(replace(g, ended=g.ended + 1) if g.branch == branch else g for g in task.groups)
        task = replace(task, groups=groups)
        tx.put_task(task)
        if all(group.waits for group in groups) and task.state in {TaskState.ACTIVE, TaskState.PAUSED}:
            task = self._claim_groups(tx, now, task)
        return task

    def _claim_groups(self, tx: Transaction, now: float, task: Task) -> Task:
        """The round whose sum is that of the groups; abandoned at once where none has made a version."""
        base = promised(tx.latest_version(task.id, MAIN), "a task's first version")
        deepest = max(task.groups, key=lambda group: group.depth)
        number = self.newest_round(tx, task) + 1
        round_ = Round(
            task_id=task.id,
            branch=MAIN,
            number=number,
            version_number=base.number,
            live=self.live(tx, task, deepest, number, base),
            invited=(),
            state=RoundState.FOLDING,
            opened_at=now,
            deadline_at=None,
            closed_at=None,
            reason="",
        )
        tx.put_round(round_)
        if any(changes_of(tx, task, group) for group in task.groups):
            return task
        self._abandon(tx, now, round_, "no group has folded a round")
        return self._begin_again(tx, now, self._give_up(tx, task), number)

    def _begin_period(
        self,
        tx: Transaction,
        now: float,
        task: Task,
        version: Version,
        round_number: int | None,
        grouping: Grouping,
    ) -> Task:
        """Every group begins from a version of the main branch, under the next number of its own branch."""
        groups = tuple(
            replace(group, ended=0, version_number=self._copy(tx, now, version, group.branch, round_number))
            for group in grouping.groups
        )
        task = replace(task, groups=groups)
        tx.put_task(task)
        active = {part.device_id for part in tx.participants(task.id)} if grouping.members else set()
        tx.put_members(task.id, {d: group for d, group in grouping.members.items() if d in active})
        return task

    def _begin_again(self, tx: Transaction, now: float, task: Task, round_number: int) -> Task:
        """The period anew, from the version it began with: what the groups made of it is not put together."""
        base = promised(tx.latest_version(task.id, MAIN), "a task's first version")
        return self._begin_period(tx, now, task, base, round_number, Grouping(groups=task.groups))

    @staticmethod
    def _copy(tx: Transaction, now: float, version: Version, branch: str, round_number: int | None) -> int:
        """Publish the same factors as the next version of a group's branch; returns its number.

        Nothing is published where the branch stands there already.
        """
        newest = tx.latest_version(version.task_id, branch)
        if newest is not None and newest.sha256 == version.sha256:
            return newest.number
        number = newest.number + 1 if newest else 0
        tx.add_version(
            Version(
                task_id=version.task_id,
                branch=branch,
                number=number,
                sha256=version.sha256,
                parents=(version.sha256,),
                gauge=version.gauge,
                state=version.state,
                created_at=now,
                round_number=round_number if number else None,
                updates=0,
                examples=0,
                loss_first=None,
                loss_last=None,
            )
        )
        return number

    # tasks

    @staticmethod
    def create(
        tx: Transaction,
        now: float,
        spec: TaskSpec,
        bundle: str,
        first_sha256: str,
        variants: Mapping[int, str] = MappingProxyType({}),
    ) -> Task:
        """Open a task on a bundle the store has; version 0 is the factors of this hash.

        variants: rank -> hash of version 0 at each of the method's other ranks.
        """
        task = tx.add_task(
            Task(
                id=0,
                spec=spec,
                bundle=bundle,
                state=TaskState.ACTIVE,
                reason="",
                created_at=now,
                resumed_after=0,
            )
        )
        Lifecycle._add(
            tx,
            Version(
                task_id=task.id,
                branch=MAIN,
                number=0,
                sha256=first_sha256,
                parents=(),
                gauge="plain",
                state=VersionState.RELEASED,
                created_at=now,
                round_number=None,
                updates=0,
                examples=0,
                loss_first=None,
                loss_last=None,
            ),
            variants,
        )
        return task

    @staticmethod
    def _add(tx: Transaction, version: Version, variants: Mapping[int, str]) -> None:
        """Insert a version and, under the same number, what it is at other ranks."""
        tx.add_version(version)
        for rank, sha256 in variants.items():
            parents = (version.sha256,) if version.number else ()
            tx.add_version(replace(version, branch=rank_branch(rank), sha256=sha256, parents=parents))

    def set_active(
        self, tx: Transaction, now: float, name: str, state: TaskState, reason: str
    ) -> Task | None:
        """Pause or resume; a task that has ended stays so. None where there is no such task.

        Rounds from before it was resumed count no longer towards giving up; a candidate's time starts anew.
        """
        task = tx.task(name)
        if task is not None and task.state in {TaskState.ACTIVE, TaskState.PAUSED}:
            if state is TaskState.ACTIVE:
                resumed_at = now if task.state is TaskState.PAUSED else task.resumed_at
                task = replace(task, resumed_after=self.newest_round(tx, task), resumed_at=resumed_at)
            task = replace(task, state=state, reason=reason)
            tx.put_task(task)
        return task

    def stop(self, tx: Transaction, now: float, name: str, reason: str) -> Task | None:
        """End a task: open rounds are abandoned, a fold under way is let finish."""
        task = tx.task(name)
        if task is None or task.state in {TaskState.STOPPED, TaskState.FINISHED}:
            return task
        task = replace(task, state=TaskState.STOPPED, reason=reason)
        tx.put_task(task)
        for branch in self._branches(task):
            round_ = tx.latest_round(task.id, branch)
            if round_ is not None and round_.state is RoundState.OPEN:
                self._abandon(tx, now, round_, "the task was stopped")
        return task
