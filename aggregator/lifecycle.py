"""How rounds and tasks move on: open, claim, fold, abandon, finish, pause, stop.

A fold is three steps. `claim` fixes the set of updates in one transaction (the round is FOLDING and takes
no more). The sum is computed outside any transaction, in ledger order, so that it gives the same bits each
time. `publish` inserts the version and settles the updates in one short transaction; the version's key is
the fence against a second fold. A crash after `claim` finds the round still FOLDING and sums again.

What follows where devices train in groups is in `aggregator.periods`.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from msgspec import Struct
from msgspec.structs import replace

from aggregator import rules
from aggregator.grouping import Grouping
from aggregator.periods import Periods
from aggregator.promised import promised
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


class Lifecycle(Periods):
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

    def _open_next(self, tx: Transaction, now: float, task: Task) -> None:
        if task.state is TaskState.ACTIVE:
            for branch in self._branches(task):
                self.ensure_round(tx, now, task, branch)

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

    # tasks

    @staticmethod
    def create(
        tx: Transaction,
        now: float,
        spec: TaskSpec,
        bundle: str,
        first_sha256: str,
        variants: Mapping[int, str] = MappingProxyType({}),
        *,
        draw_key: str,
    ) -> Task:
        """Open a task on a bundle the store has; version 0 is the factors of this hash.

        variants: rank -> hash of version 0 at each of the method's other ranks. draw_key: of its cohorts.
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
                draw_key=draw_key,
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
