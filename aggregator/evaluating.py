"""Candidates judged by devices that did not train them: who is asked, and what they answer."""

from __future__ import annotations

import secrets
from collections.abc import Callable

from msgspec.structs import replace

from aggregator.problems import conflict, stale, unknown_lease
from aggregator.promised import promised
from fedtt.evaluation import EvaluationSpec, counts
from fedtt.messages import Judge, Problem, Verdict
from storage.records import (
    MAIN,
    Device,
    Evaluation,
    EvaluationState,
    Task,
    TaskState,
    Version,
    VersionState,
)
from storage.store import Transaction

__all__ = ["Evaluations", "is_judged", "judged_until", "verdicts"]


def verdicts(spec: EvaluationSpec, evaluations: list[Evaluation]) -> list[Verdict]:
    """Those that count, in their order; none of devices that were erased since."""
    return [e.verdict for e in evaluations if e.verdict and counts(spec, e.verdict)]


def is_judged(tx: Transaction, task: Task) -> bool:
    """Whether the newest version waits for its verdict."""
    newest = tx.latest_version(task.id, MAIN) if task.spec.evaluation else None
    return newest is not None and newest.state is VersionState.CANDIDATE


def judged_until(task: Task, version: Version, spec: EvaluationSpec) -> float:
    """When a candidate's time is over; while its task is paused no time is lost."""
    return max(version.created_at, task.resumed_at) + spec.deadline_s


class Evaluations:
    """Asks devices for verdicts and takes them; stateless."""

    def __init__(self, new_lease_id: Callable[[], str] | None = None) -> None:
        self._new_lease_id = new_lease_id or (lambda: secrets.token_hex(16))

    def offer(self, tx: Transaction, now: float, device: Device, task: Task, *, judges: bool) -> Judge | None:
        """The question about a task's candidate, if this device is one to ask; the same again if it was."""
        spec = task.spec.evaluation
        if spec is None or spec.by != "devices" or not judges or not device.examples:
            return None
        version = tx.latest_version(task.id, MAIN)
        if version is None or version.state is not VersionState.CANDIDATE:
            return None
        ends_at = judged_until(task, version, spec)
        if now >= ends_at:
            return None
        asked = tx.evaluations(task.id, MAIN, version.number)
        mine = next((e for e in asked if e.device_id == device.id), None)
        if mine is None and not self._trained(tx, device, version) and _wanted(spec, asked, now):
            mine = self._ask(tx, now, device, version, ends_at)
        if mine is None or mine.state is not EvaluationState.ACTIVE:
            return None
        if mine.expires_at < ends_at:  # the task was resumed since
            mine = replace(mine, expires_at=ends_at)
            tx.put_evaluation(mine)
        return self._question(tx, now, task, spec, version, mine)

    @staticmethod
    def _trained(tx: Transaction, device: Device, version: Version) -> bool:
        """Whether the device's own update may be part of the version."""
        part = tx.participation(version.task_id, device.id)
        return part is not None and part.last_round == version.round_number

    def _ask(
        self, tx: Transaction, now: float, device: Device, version: Version, ends_at: float
    ) -> Evaluation:
        evaluation = Evaluation(
            lease_id=self._new_lease_id(),
            task_id=version.task_id,
            branch=MAIN,
            version_number=version.number,
            device_id=device.id,
            granted_at=now,
            expires_at=ends_at,
            state=EvaluationState.ACTIVE,
        )
        tx.put_evaluation(evaluation)
        return evaluation

    @staticmethod
    def _question(
        tx: Transaction, now: float, task: Task, spec: EvaluationSpec, version: Version, mine: Evaluation
    ) -> Judge:
        before = promised(tx.version(task.id, MAIN, version.number - 1), "what a version was made from")
        return Judge(
            lease=mine.lease_id,
            expires_in_s=mine.expires_at - now,
            task=task.spec.name,
            seed=task.spec.seed,
            bundle=task.bundle,
            version=version.sha256,
            version_number=version.number,
            before=before.sha256,
            examples=spec.examples,
        )

    def accept(
        self, tx: Transaction, now: float, device_name: str, lease_id: str, verdict: Verdict
    ) -> Problem | None:
        """Take a verdict; the same again is harmless."""
        evaluation = tx.evaluation(lease_id)
        if evaluation is None or evaluation.device_id != device_name:
            return unknown_lease(lease_id)
        if evaluation.state is EvaluationState.DONE:
            return None if evaluation.verdict == verdict else conflict(lease_id)
        task = promised(tx.task_by_id(evaluation.task_id), "a verdict's task")
        version = promised(
            tx.version(evaluation.task_id, evaluation.branch, evaluation.version_number),
            "a verdict's version",
        )
        if version.state is not VersionState.CANDIDATE or task.state is TaskState.STOPPED:
            return stale(f"version {version.number} waits for no verdict any more")
        if evaluation.state is EvaluationState.FAILED or now >= evaluation.expires_at:
            return stale("the lease was given back or has expired")
        tx.put_evaluation(replace(evaluation, state=EvaluationState.DONE, verdict=verdict))
        return None

    @staticmethod
    def fail(tx: Transaction, device_name: str, lease_id: str) -> Problem | None:
        """Take a question back from a device that cannot answer it."""
        evaluation = tx.evaluation(lease_id)
        if evaluation is None or evaluation.device_id != device_name:
            return unknown_lease(lease_id)
        if evaluation.state is EvaluationState.ACTIVE:
            tx.put_evaluation(replace(evaluation, state=EvaluationState.FAILED))
        return None


def _wanted(spec: EvaluationSpec, asked: list[Evaluation], now: float) -> bool:
    """Whether one more is to be asked: a place is free again without a verdict in time that counts."""
    busy = (e.state is EvaluationState.ACTIVE and now < e.expires_at for e in asked)
    return sum(busy) + len(verdicts(spec, asked)) < spec.devices
