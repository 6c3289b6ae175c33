"""From a lease to a frame on disk, or to a verdict: within the budget, in one go, noted in the journal."""

from __future__ import annotations

import asyncio
import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from msgspec.structs import replace

from edge_client import events
from edge_client.allowance import (
    Pace,
    check_memory,
    check_time,
    check_upload,
    pace_key,
    rows,
    spent_before,
    with_pace,
    with_spent,
)
from edge_client.aside import Aside
from edge_client.bundle import Bundle
from edge_client.conditions import Watch
from edge_client.device_config import DeviceConfig
from edge_client.examples import Examples
from edge_client.journal import Journal, Judging, Leased, Residual, Trained, residual_key
from edge_client.label_counts import told_labels
from edge_client.local_training import LocalTraining
from edge_client.private_steps import noise_key, noise_secret
from edge_client.trainer import trained_adapter
from fedtt.budget import Budget
from fedtt.errors import Declined, FedttError, UnavailableError
from fedtt.messages import Judge, Plan, Verdict
from fedtt.privacy import epsilon_of
from fedtt.seams import Clock
from fedtt.wire import with_label_counts
from fedtt.work import trained_depth

__all__ = ["LeaseOverError", "LeasedWork"]


_LATE_S = 86400.0  #: by which an update may be behind its round


class _Begun(NamedTuple):
    """What a training that has begun will need of its journal."""

    pace: str  #: where its pace is noted; "" where its time has no limit
    residual_key: str
    residual: bytes
    label_counts: bytes
    privacy_spent: dict[str, float]  #: by task, this training with it
    noise_key: bytes


class LeaseOverError(FedttError):
    """A lease ended before its training or judging could begin."""


class LeasedWork:
    """Trains or judges what a lease asks for; holds nothing that the journal does not."""

    def __init__(
        self,
        config: DeviceConfig,
        journal: Journal,
        training: LocalTraining,
        examples: Examples,
        watch: Watch,
        clock: Clock,
        uniform: Callable[[], float],
        aside: Aside,
    ) -> None:
        self._config, self._journal, self._training = config, journal, training
        self._examples, self._watch, self._clock = examples, watch, clock
        self._uniform, self._aside = uniform, aside

    async def train(self, leased: Leased) -> events.Trained:
        """Fetch, train and store the frame. Raises Declined before anything is loaded or run that is beyond
        a budget, LeaseOverError where the download outlasted the lease, and what `LocalTraining` does.
        """
        with self._training.using(leased.work.plan):
            return await self._train(leased)

    async def judge(self, question: Judge) -> Verdict:
        """Fetch two versions and judge them, within the owner's limits and as long as the server waits.

        That it begins is noted, so that what kills the process is not tried for ever (`cut_short`). Raises
        LeaseOverError where the download outlasted the lease, and what `LocalTraining` does.
        """
        ends_at, budget = self._clock.now() + question.expires_in_s, self._config.budget
        with self._training.using(question):
            request = await self._training.fetch_question(
                question, self._journal.state.release_key or None, budget.download_bytes
            )
            if (left_s := ends_at - self._clock.now()) <= 0:
                raise LeaseOverError("the lease expired while what it judges was loaded, which is kept")
            limit_s = min(left_s, budget.time_s or math.inf)
            cut_short = self.cut_short(question)
            before = Judging(lease=question.lease, attempts=cut_short) if cut_short else Judging()
            note = Judging(lease=question.lease, attempts=cut_short + 1)
            await self._aside(self._journal.update, judging=note)
            try:
                verdict = await self._training.judge(dataclasses.replace(request, time_limit_s=limit_s))
            except (asyncio.CancelledError, UnavailableError):  # no crash, nor an end
                await self._aside(self._journal.update, judging=before)
                raise
            except FedttError:
                await self._aside(self._journal.update, judging=Judging())
                raise
            await self._aside(self._journal.update, judging=Judging())
            return verdict

    def cut_short(self, question: Judge) -> int:
        """How often judging for this question began and did not end."""
        begun = self._journal.state.judging
        return begun.attempts if begun.lease == question.lease else 0

    async def _train(self, leased: Leased) -> events.Trained:
        plan = leased.work.plan
        budget = plan.budget.within(self._config.budget)
        check_memory(plan, self._config.budget, await self._watch.free_mb())
        bundle, version = await self._training.fetch(
            plan, self._journal.state.release_key or None, budget.download_bytes
        )
        if self._clock.now() >= leased.expires_at:
            raise LeaseOverError("the lease expired while its bundle was loaded, which is kept")
        begun, limit_s = None, min(self._of_use_s(leased), budget.time_s or math.inf)
        try:
            begun = await self._aside(self._begin, leased, bundle, budget)
            update = await self._training.run(
                plan, bundle, version, begun.residual, noise_key=begun.noise_key, time_limit_s=limit_s
            )
        except (asyncio.CancelledError, UnavailableError):  # no crash, nor an end
            await self._aside(self._journal.update, phase=leased)
            raise
        except Declined:
            if begun is not None:  # it ran out of time: it is as slow as that at least
                await self._aside(self._keep, begun.pace, plan, budget, 1.01 * limit_s)
            raise
        frame = with_label_counts(update.frame, begun.label_counts) if begun.label_counts else update.frame
        await self._aside(
            self._keep,
            begun.pace,
            plan,
            budget,
            update.training_s,
            phase=Trained(
                lease=leased.work.lease,
                frame=frame,
                residual_key=begun.residual_key,
                residual=Residual(version_number=plan.version_number, data=update.residual),
            ),
            privacy_spent=begun.privacy_spent,
        )
        header = update.header
        return events.Trained(
            lease=leased.work.lease,
            examples=header.examples,
            steps=header.steps,
            loss_first=header.loss_first,
            loss_last=header.loss_last,
            cut_texts=update.cut_texts,
            frame_bytes=len(frame),
            wall_s=update.training_s,
            depth=update.depth,
            prefixes_computed=update.prefixes_computed,
            prefixes_reused=update.prefixes_reused,
            epsilon=epsilon_of(begun.privacy_spent[plan.task], plan.privacy.delta) if plan.privacy else None,
        )

    def _of_use_s(self, leased: Leased) -> float:
        """Seconds after which nobody waits for an update: a day after the end of its lease and its round.

        A server takes one later where its task has rounds that overlap (`max_staleness`), which no plan says;
        one so old counts for little there.
        """
        work = leased.work
        left_s = min(leased.expires_at - self._clock.now(), work.expires_in_s)
        return left_s + max(0.0, (work.round_ends_in_s or 0.0) - work.expires_in_s) + _LATE_S

    def _begin(self, leased: Leased, bundle: Bundle, budget: Budget) -> _Begun:
        """Check what can be told of a training, and note that it begins.

        Raises Declined where it would be too long, or its frame, or say too much of the examples.
        """
        plan, journal = leased.work.plan, self._journal
        adapter = trained_adapter(plan, bundle.manifest)
        live = adapter.layout.live_set(plan.live)
        labels = len(bundle.manifest.labels) if plan.label_epsilon and self._config.label_epsilon else 0
        check_upload(budget.upload_bytes, plan, live, labels)
        limited = budget.time_s is not None
        pace = pace_key(plan, trained_depth(adapter, live.indices)) if limited else ""
        if known := journal.state.paces.get(pace):
            count = rows(plan, self._examples.count())
            check_time(budget.time_s, known.expected_s(count, self._clock.now()))
        key = residual_key(plan.task, adapter.layout.digest) if plan.codec.error_feedback else ""
        residual = journal.residual(key, plan.version_number)
        counts = self._label_counts(plan, bundle.manifest.labels)
        spent, noise = self._privacy(plan, leased.work.lease)
        journal.update(phase=replace(leased, attempts=leased.attempts + 1))
        return _Begun(pace, key, residual, counts, spent, noise)

    def _keep(self, pace: str, plan: Plan, budget: Budget, training_s: float, **changes: object) -> None:
        """Change the journal; where time is limited the same write notes how long the training took."""
        if budget.time_s is not None:
            count = rows(plan, self._examples.count())
            measured = Pace(row_s=training_s / count, at=self._clock.now())
            changes["paces"] = with_pace(self._journal.state.paces, pace, measured)
        self._journal.update(**changes)

    def _privacy(self, plan: Plan, lease: str) -> tuple[dict[str, float], bytes]:
        """What all private trainings have spent once this one is done, by task, and the key of its noise.

        Raises Declined where that is more than the task allows.
        """
        spent, privacy = self._journal.state.privacy_spent, plan.privacy
        if privacy is None:
            return spent, b""
        training, count = plan.training, max(1, self._examples.count())
        before = spent_before(spent, plan.task)
        mu_squared = before + privacy.spent(count, training.batch_size, training.local_steps)
        epsilon = epsilon_of(mu_squared, privacy.delta)
        if privacy.epsilon is not None and epsilon > privacy.epsilon:
            raise Declined(
                f"with this training ε would be {epsilon:.3g}, the task allows {privacy.epsilon:g}", "privacy"
            )
        if not self._journal.state.noise_secret:
            self._journal.update(noise_secret=noise_secret(self._uniform))
        key = noise_key(self._journal.state.noise_secret, lease, plan, before)
        return with_spent(spent, plan.task, mu_squared), key

    def _label_counts(self, plan: Plan, labels: Sequence[str]) -> bytes:
        """What is told of this device's labels: nothing, unless the plan asks and the owner allows it."""
        allowed = self._config.label_epsilon
        if plan.label_epsilon is None or not allowed:
            return b""
        epsilon = min(plan.label_epsilon, allowed)
        return told_labels(self._journal, self._examples, labels, epsilon, self._uniform)
