"""Where devices train in groups: each group's branch has rounds of its own, and all together make a period.

When all groups have held theirs, a round without leases is claimed on the main branch at once; its sum puts
their changes together, and its version is published on the main branch and, under their next numbers, on all
of theirs.
"""

from __future__ import annotations

from msgspec.structs import replace

from aggregator.grouping import Grouping, changes_of
from aggregator.promised import promised
from aggregator.rounds import Rounds
from storage.records import MAIN, Round, RoundState, Task, TaskState, UpdateState, Version
from storage.store import Transaction

__all__ = ["Periods"]


class Periods(Rounds):
    """Ends rounds that make no version, and begins what follows where devices train in groups."""

    def _abandon(self, tx: Transaction, now: float, round_: Round, why: str) -> None:
        tx.put_round(replace(round_, state=RoundState.ABANDONED, closed_at=now, reason=why))
        waiting = tx.updates(round_.task_id, round_.branch, round_.number, UpdateState.ACCEPTED)
        leases = [update.lease_id for update in waiting]
        reason = f"round {round_.number} was abandoned: {why}"
        tx.settle(leases, UpdateState.DISCARDED, reason=reason)

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
