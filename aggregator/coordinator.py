"""The coordinator: what each request changes in the ledger, as short transactions over a Store.

It holds no state of its own. Every method takes an open transaction and the time, decides by `rules`, and
returns the protocol's answer or a typed Problem; a refusal changes nothing. So a crash between any two
transactions loses nothing, and any number of coordinators may share one store.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from typing import NamedTuple

from msgspec.structs import replace

from aggregator import rules
from aggregator.evaluating import Evaluations, is_judged
from aggregator.grouping import group_on, hierarchical
from aggregator.lifecycle import Lifecycle
from aggregator.population import Population, is_new, known_device, newer, told
from aggregator.problems import replayed, unknown_device, unknown_lease
from aggregator.promised import promised
from aggregator.uploads import Uploads
from fedtt.messages import (
    AsTold,
    CheckIn,
    CheckInAnswer,
    Plan,
    Problem,
    Retired,
    Tell,
    Wait,
    Work,
)
from fedtt.sampling import next_turn
from fedtt.task import TaskSpec
from storage.records import (
    Device,
    DeviceState,
    Lease,
    LeaseState,
    Round,
    Task,
    TaskState,
    rank_branch,
)
from storage.store import Transaction

__all__ = ["IDLE_RETRY_S", "NO_TASK", "Coordinator"]

NO_TASK = "no task is active"  #: why a device waits where there is none
IDLE_RETRY_S = 60.0  #: where no task is active
_FOLDING_S = 1.0  #: after which devices ask again, on average
_ROUNDS_KEPT = 16


class _Opened(NamedTuple):
    """Who is invited to a round, and the round before it."""

    invited: frozenset[str]
    last: Round | None


class Coordinator(Population, Uploads):
    """Answers devices; `lifecycle` moves rounds on. Stateless but for what open rounds have for good."""

    def __init__(self, lifecycle: Lifecycle, new_lease_id: Callable[[], str] | None = None) -> None:
        super().__init__(lifecycle)
        self._rounds: dict[tuple[int, str, int, float], _Opened] = {}
        self._plans: dict[
            tuple[int, str, int | None], Plan
        ] = {}  #: of a task, a branch and a rank: the newest
        self._new_lease_id = new_lease_id or (lambda: secrets.token_hex(16))
        self.evaluations = Evaluations(new_lease_id)

    def check_in(
        self,
        tx: Transaction,
        now: float,
        device_name: str,
        message: CheckIn | AsTold,
        nonce: int | None = None,
    ) -> CheckInAnswer | Problem:
        """Offer work of the first task that has a seat, or whose newest version this device is to judge; the
        same lease again where one is still held. `Tell` has changed nothing, as a refusal.
        """
        device = known_device(tx, device_name)
        if device is None:
            return unknown_device()
        if device.state is DeviceState.LEFT:
            return Retired(reason="this device has left; enrol again to take part")
        if not is_new(device, nonce):
            return replayed()
        facts = told(device, message)
        if facts is None:
            return Tell()
        seen = replace(
            device,
            client=facts.client,
            runtimes=facts.runtimes,
            examples=facts.examples,
            memory_mb=facts.memory_mb,
            seen_at=now,
            last_nonce=newer(device, nonce),
        )
        tx.put_device(seen)
        waits: list[Wait] = []
        for task in sorted(tx.tasks(), key=lambda task: -task.spec.priority):
            if task.state is TaskState.ACTIVE:
                if question := self.evaluations.offer(tx, now, seen, task, judges=facts.judges):
                    return question
                answer = self._offer(tx, now, seen, task)
                if isinstance(answer, Work):
                    return answer
                waits.append(answer)
        if not waits:
            return self._idle(now, device_name, NO_TASK)
        return min(waits, key=lambda wait: wait.retry_after_s)

    def _offer(self, tx: Transaction, now: float, device: Device, task: Task) -> Work | Wait:
        spec = task.spec
        if self.lifecycle.manifest(tx, task).graphs.keys().isdisjoint(device.runtimes):
            return self._idle(now, device.id, "the task's bundle has no graph for your runtime")
        if device.examples < spec.min_examples:
            few = f"the task needs {spec.min_examples} examples, you have {device.examples}"
            return self._idle(now, device.id, few)
        if 0 < device.memory_mb < (needed := spec.budget.memory_mb or 0):
            little = f"the task may use {needed} MiB of memory, you have {device.memory_mb}"
            return self._idle(now, device.id, little)
        branch = self.lifecycle.branch_of(tx, task, device.id)
        round_ = self.lifecycle.ensure_round(tx, now, task, branch)
        if round_ is None:
            return self._wait_for_round(tx, task, branch, device)
        held = tx.lease_of(device.id, task.id, branch, round_.number)
        if held is not None and held.state is LeaseState.ACTIVE and now < held.expires_at:
            return self._work(tx, now, task, round_, held)
        if held is None and (why := self._sits_out(tx, device, task, round_)):
            return self._wait(spec, round_, device, why)
        if held is not None or not self._has_seat(tx, now, device, task, round_):
            return self._not_needed(tx, now, device, task, round_)
        return self._grant(tx, now, device, task, round_)

    def _wait_for_round(self, tx: Transaction, task: Task, branch: str, device: Device) -> Wait:
        group, last = group_on(task, branch), tx.latest_round(task.id, branch)
        if group is not None and group.waits and last is not None:
            return self._wait(task.spec, last, device, "its group waits for the others")
        if last is not None and is_judged(tx, task):
            return self._wait(task.spec, last, device, "the newest version is being judged")
        spec, number = task.spec, last.number if last is not None else 0
        soon_s = rules.retry_after_s(spec.rounds, spec.seed, number, device.id, mean_s=_FOLDING_S)
        return Wait(retry_after_s=soon_s, reason="the round is being folded")

    @staticmethod
    def _idle(now: float, device_name: str, reason: str) -> Wait:
        return Wait(retry_after_s=rules.idle_retry_s(IDLE_RETRY_S, now, device_name), reason=reason)

    @staticmethod
    def _wait(spec: TaskSpec, round_: Round, device: Device, reason: str) -> Wait:
        again_s = rules.retry_after_s(spec.rounds, spec.seed, round_.number, device.id)
        return Wait(retry_after_s=again_s, reason=reason)

    def _not_needed(self, tx: Transaction, now: float, device: Device, task: Task, round_: Round) -> Wait:
        """Until the next round that may draw this device, where that can be foreseen."""
        wait = self._wait(task.spec, round_, device, "not needed in this round")
        if not _may_sleep(task):
            return wait
        spec = task.spec.rounds
        round_s = rules.pace_s(spec, self._opened(tx, round_).last, round_)
        if round_s is None:
            return wait
        turn = next_turn(task.draw_key, device.id, round_.number, spec.cohort, round_.drawn_from)
        foreseen_s = rules.foreseen_s(task.spec, round_s, round_, turn, now, device.id)
        return replace(wait, retry_after_s=max(wait.retry_after_s, foreseen_s))

    def _has_seat(self, tx: Transaction, now: float, device: Device, task: Task, round_: Round) -> bool:
        spec = self.lifecycle.seats(task, round_.branch)
        if rules.free_seats(spec, tx.count_leases(task.id, round_.branch, round_.number)) <= 0:
            return False
        return rules.seat_open_to_all(spec, round_, now) or device.id in self._opened(tx, round_).invited

    def _opened(self, tx: Transaction, round_: Round) -> _Opened:
        """What never changes while a round is open."""
        key = (round_.task_id, round_.branch, round_.number, round_.opened_at)
        if key not in self._rounds:
            while len(self._rounds) >= _ROUNDS_KEPT:
                del self._rounds[next(iter(self._rounds))]
            last = tx.round(round_.task_id, round_.branch, round_.number - 1)
            self._rounds[key] = _Opened(frozenset(round_.invited), last)
        return self._rounds[key]

    @staticmethod
    def _sits_out(tx: Transaction, device: Device, task: Task, round_: Round) -> str | None:
        """Why a device's earlier updates keep it out of a round, invited or not; None where they do not."""
        sampling = task.spec.sampling
        part = tx.participation(task.id, device.id) if sampling.is_limited else None
        return sampling.refusal(part.count, part.last_round, round_.number) if part else None

    @staticmethod
    def _end_older_leases(tx: Transaction, device: Device, task: Task) -> None:
        """A device whose part is limited holds one lease, so that no two updates of it are on the way."""
        for state in (LeaseState.ACTIVE, LeaseState.EXPIRED):
            for lease in tx.leases_of(device.id, state):
                if lease.task_id == task.id:
                    tx.put_lease(replace(lease, state=LeaseState.FAILED))

    @staticmethod
    def _rank(tx: Transaction, device: Device, task: Task) -> int | None:
        """By what the device says of its memory, and how long the task's last update of it took."""
        method = task.spec.method
        part = tx.participation(task.id, device.id) if method.ranks else None
        return method.rank_for(device.memory_mb, part.full_s if part else None)

    def _grant(self, tx: Transaction, now: float, device: Device, task: Task, round_: Round) -> Work:
        lease = Lease(
            id=self._new_lease_id(),
            task_id=task.id,
            branch=round_.branch,
            round_number=round_.number,
            version_number=round_.version_number,
            device_id=device.id,
            granted_at=now,
            expires_at=now + task.spec.rounds.lease_lasts_s,
            state=LeaseState.ACTIVE,
            rank=self._rank(tx, device, task),
        )
        if task.spec.sampling.is_limited and task.spec.rounds.max_staleness:
            self._end_older_leases(tx, device, task)
        tx.put_lease(lease)
        if round_.deadline_at is None:
            round_ = rules.with_deadline(task.spec.rounds, round_, now)
            tx.put_round(round_)
        return self._work(tx, now, task, round_, lease)

    def _work(self, tx: Transaction, now: float, task: Task, round_: Round, lease: Lease) -> Work:
        ends_at = round_.deadline_at
        return Work(
            lease=lease.id,
            expires_in_s=max(0.0, lease.expires_at - now),
            plan=self._plan(tx, task, round_, lease),
            round_ends_in_s=None if ends_at is None else max(0.0, ends_at - now),
        )

    def _plan(self, tx: Transaction, task: Task, round_: Round, lease: Lease) -> Plan:
        """What a lease's round trains: the same for nearly all of its devices, so made once for them."""
        branch = lease.branch if lease.rank is None else rank_branch(lease.rank)
        version = promised(tx.version(task.id, branch, lease.version_number), "a lease's version")
        label_epsilon = _label_epsilon(tx, task, lease.device_id)
        place = (task.id, lease.branch, lease.rank)
        known = self._plans.get(place)
        if known is not None and (known.round, known.live, known.version, known.label_epsilon) == (
            round_.number,
            round_.live,
            version.sha256,
            label_epsilon,
        ):
            return known
        self._plans[place] = plan = Plan(
            task=task.spec.name,
            seed=task.spec.seed,
            bundle=task.bundle,
            version=version.sha256,
            version_number=version.number,
            round=round_.number,
            rank=lease.rank,
            live=round_.live,
            training=task.spec.training_in(round_.number),
            codec=task.spec.codec,
            method=task.spec.method,
            min_examples=task.spec.min_examples,
            label_epsilon=label_epsilon,
            budget=task.spec.budget,
            privacy=task.spec.privacy,
        )
        return plan

    def fail(self, tx: Transaction, device_name: str, lease_id: str) -> Problem | None:
        """Take a lease back from a device that cannot fulfil it; its seat is free again."""
        lease = tx.lease(lease_id)
        if lease is None:
            return self.evaluations.fail(tx, device_name, lease_id)
        if lease.device_id != device_name:
            return unknown_lease(lease_id)
        if lease.state in {LeaseState.ACTIVE, LeaseState.EXPIRED}:
            tx.put_lease(replace(lease, state=LeaseState.FAILED))
        return None


def _may_sleep(task: Task) -> bool:
    """Whether a device that a round does not need is needed for nothing else soon.

    Not where devices judge; nor where they train in groups, also before these are formed: each group then has
    seats of its own, whatever turn a device had among all.
    """
    judge = task.spec.evaluation
    devices_judge = judge is not None and judge.by == "devices"
    return task.spec.sampling.is_plain and hierarchical(task) is None and not devices_judge


def _label_epsilon(tx: Transaction, task: Task, device_id: str) -> float | None:
    """Of the label counts a device is asked for, as long as it has not told them."""
    method = hierarchical(task)
    if method is None or method.label_epsilon is None:
        return None
    part = tx.participation(task.id, device_id)
    return method.label_epsilon if part is None or part.label_counts is None else None
