"""Versions before devices train from them: judged, then released or held; and brought back by an operator.

A version that is held is followed by what stood before it, under the next number. So numbers only rise,
devices see nothing go backward, and the newest version that is no candidate is always one to train from.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from msgspec.structs import replace

from aggregator.evaluating import judged_until, verdicts
from aggregator.grouping import Grouping
from aggregator.lifecycle import Lifecycle
from aggregator.problems import conflict_version, not_found
from aggregator.promised import promised
from fedtt.evaluation import measured, worse
from fedtt.messages import Problem, Verdict
from storage.records import MAIN, Round, RoundState, Task, TaskState, Version, VersionState, rank_branch
from storage.store import Transaction

__all__ = ["Releases"]


class Releases(Lifecycle):
    """The lifecycle with verdicts in it."""

    def advance(
        self, tx: Transaction, now: float, decided: Callable[[Version], None] = lambda version: None
    ) -> list[Round]:
        """decided: told of each version that is released or held now."""
        folding = super().advance(tx, now)
        for task in tx.tasks():
            version = self._candidate(tx, task) if task.state is TaskState.ACTIVE else None
            if version and (judged := self._settle(tx, now, task, version)):
                decided(judged)
        return folding

    @staticmethod
    def _candidate(tx: Transaction, task: Task) -> Version | None:
        """The newest version, where it waits for its verdict."""
        if task.spec.evaluation is None:
            return None
        newest = promised(tx.latest_version(task.id, MAIN), "a task's first version")
        return newest if newest.state is VersionState.CANDIDATE else None

    def _settle(self, tx: Transaction, now: float, task: Task, version: Version) -> Version | None:
        """Go by the devices' verdicts once enough are in; hold a candidate that was not judged in time.

        Returns what has become of it; None while it waits.
        """
        spec = promised(task.spec.evaluation, "how a candidate is judged")
        found = verdicts(spec, tx.evaluations(task.id, MAIN, version.number))
        is_late = now >= judged_until(task, version, spec)
        if len(found) >= (spec.least if is_late else spec.devices):
            return self._decide(tx, now, task, version, found)
        if is_late:
            judges = f"{len(found)} of at least {spec.least} devices" if spec.by == "devices" else "nobody"
            resumed = task.resumed_at > version.created_at
            since = "the task was resumed" if resumed else "its fold"
            why = f"{judges} had judged it {spec.deadline_s:g} s after {since}"
            return self._hold(tx, now, task, version, why)
        return None

    def judge(
        self, tx: Transaction, now: float, name: str, number: int, verdict: Verdict
    ) -> Version | Problem:
        """Release or hold a candidate by a verdict from outside; what it has become."""
        found = self._judged(tx, name, number)
        if isinstance(found, Problem):
            return found
        task, version = found
        return self._decide(tx, now, task, version, [verdict])

    def release(self, tx: Transaction, now: float, name: str, number: int) -> Version | Problem:
        """Release a candidate without a verdict, or allow a version that was held to be brought back."""
        found = self._judged(tx, name, number, held=True)
        if isinstance(found, Problem):
            return found
        task, version = found
        if version.state is VersionState.CANDIDATE:
            return self._release(tx, now, task, version)
        version = replace(version, state=VersionState.RELEASED)
        tx.put_version(version)
        return version

    def hold(self, tx: Transaction, now: float, name: str, number: int, why: str) -> Version | Problem:
        """Hold a candidate without a verdict."""
        found = self._judged(tx, name, number)
        return found if isinstance(found, Problem) else self._hold(tx, now, *found, why)

    def _judged(
        self, tx: Transaction, name: str, number: int, *, held: bool = False
    ) -> tuple[Task, Version] | Problem:
        task = tx.task(name)
        version = tx.version(task.id, MAIN, number) if task else None
        if task is None or version is None:
            return not_found(f"version {number} of task {name[:100]!r}")
        if version.state is VersionState.RELEASED or (version.state is VersionState.HELD and not held):
            return conflict_version(name, number, f"{version.state.value} already")
        return task, version

    def _decide(
        self, tx: Transaction, now: float, task: Task, version: Version, found: Sequence[Verdict]
    ) -> Version:
        spec = promised(task.spec.evaluation, "how a candidate is judged")
        report = measured(spec, found)
        version = replace(version, report=version.report | report)
        if why := worse(spec, report):
            return self._hold(tx, now, task, version, why)
        return self._release(tx, now, task, version)

    def _release(self, tx: Transaction, now: float, task: Task, version: Version) -> Version:
        version = replace(version, state=VersionState.RELEASED)
        tx.put_version(version)
        self._go_on(tx, now, task, version, None)
        return version

    def _hold(self, tx: Transaction, now: float, task: Task, version: Version, why: str) -> Version:
        version = replace(version, state=VersionState.HELD, reason=why[:500])
        tx.put_version(version)
        before = promised(tx.version(task.id, MAIN, version.number - 1), "what a version was made from")
        again = self._publish_again(tx, now, before, f"version {version.number} was held: {why}")
        self._go_on(tx, now, self._give_up_holding(tx, task, version), again, None)
        return version

    def _give_up_holding(self, tx: Transaction, task: Task, held: Version) -> Task:
        """Pause a task whose last versions were all held; each is followed by what stood before it."""
        limit = task.spec.rounds.give_up_after
        numbers = range(held.number, held.number - 2 * limit, -2)
        last = [tx.version(task.id, MAIN, number) for number in numbers if number > 0]
        held_since = [
            v
            for v in last
            if v and v.state is VersionState.HELD and (v.round_number or 0) > task.resumed_after
        ]
        if len(held_since) == limit and task.state is TaskState.ACTIVE:
            reason = f"{limit} versions in a row were held, the last because {held.reason}"
            task = replace(task, state=TaskState.PAUSED, reason=reason[:500])
            tx.put_task(task)
        return task

    def roll_back(self, tx: Transaction, now: float, name: str, number: int) -> Version | Problem:
        """Publish an earlier version again under the next number; what was trained since is left behind.

        Open rounds are abandoned, and a fold under way comes to nothing: its updates are discarded. None of
        these rounds counts as a failure. A version that was held is refused until it is released.
        """
        task = tx.task(name)
        source = tx.version(task.id, MAIN, number) if task else None
        if task is None or source is None:
            return not_found(f"version {number} of task {name[:100]!r}")
        newest = promised(tx.latest_version(task.id, MAIN), "a task's first version")
        if newest.sha256 == source.sha256:
            return conflict_version(name, number, "what stands there now")
        if source.state is VersionState.HELD:
            remedy = f"if it is good after all, run `fedtt version release {name} {number}` first"
            return conflict_version(name, number, "held", remedy)
        why = f"an operator brought version {number} back"
        for branch in self._branches(task):
            round_ = tx.latest_round(task.id, branch)
            if round_ is not None and round_.state in {RoundState.OPEN, RoundState.FOLDING}:
                self._abandon(tx, now, round_, why)
        if newest.state is VersionState.CANDIDATE:
            tx.put_version(replace(newest, state=VersionState.HELD, reason=why))
        again = self._publish_again(tx, now, source, why)
        task = replace(task, resumed_after=self.newest_round(tx, task))
        tx.put_task(task)
        if task.groups:
            task = self._begin_period(tx, now, task, again, None, Grouping(groups=task.groups))
        self._open_next(tx, now, task)
        return again

    def _publish_again(self, tx: Transaction, now: float, source: Version, why: str) -> Version:
        """The same factors, at each rank, with the same state of the server, under the next number."""
        newest = promised(tx.latest_version(source.task_id, MAIN), "a task's first version")
        task = promised(tx.task_by_id(source.task_id), "a version's task")
        again = Version(
            task_id=source.task_id,
            branch=MAIN,
            number=newest.number + 1,
            sha256=source.sha256,
            parents=(source.sha256,),
            gauge=source.gauge,
            state=VersionState.RELEASED,
            created_at=now,
            round_number=None,
            updates=0,
            examples=0,
            loss_first=None,
            loss_last=None,
            server_state=source.server_state,
            reason=why[:500],
        )
        variants = {
            rank: promised(tx.version(task.id, rank_branch(rank), source.number), "a variant").sha256
            for rank in task.spec.method.ranks
        }
        self._add(tx, again, variants)
        return again
