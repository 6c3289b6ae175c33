"""Time, the server's own work, and its operator."""

from __future__ import annotations

import hashlib
from typing import Any

from hypothesis import strategies as st
from hypothesis.stateful import rule

from aggregator.lifecycle import Fold
from aggregator.promised import promised
from aggregator.releases import Releases
from fedtt.messages import (
    Code,
    Judged,
    UpdateState,
    Verdict,
)
from storage.records import MAIN, Round, RoundState, TaskState, Version, VersionState
from tests.property.machine_ledger import AuditedMachine
from tests.property.machine_state import (
    is_refused,
)

__all__ = ["VERDICTS", "ServerMachine"]

BEFORE = Judged(loss=1.0)
VERDICTS = {loss: Verdict(examples=10, before=BEFORE, after=Judged(loss=loss)) for loss in (0.5, 2.0)}


class ServerMachine(AuditedMachine):
    """Rules without devices."""

    @rule(seconds=st.sampled_from([0.5, 10.0, 25.0, 70.0, -10.0, -100.0]))
    def let_time_pass(self, seconds: float) -> None:
        self.now += seconds

    @rule(crash=st.booleans())
    def advance(self, crash: bool) -> None:
        self._transact(lambda tx: self.coordinator.lifecycle.advance(tx, self.now), crash=crash)

    @rule(crash=st.booleans(), twice=st.booleans())
    def fold(self, crash: bool, twice: bool) -> None:
        """Sum what is claimed and publish it; repeated after a crash, and by a second server."""
        with self.store.reading() as tx:
            round_ = tx.latest_round(self.task.id, MAIN)
            if round_ is None or round_.state is not RoundState.FOLDING:
                return
            fold = self._sum(tx, round_)
        for attempt in range(1 + twice):
            version = self._transact(
                lambda tx: self.coordinator.lifecycle.publish(tx, self.now, fold), crash=crash
            )
            assert (version is not None) == (attempt == 0 and not crash)

    @rule(crash=st.booleans())
    def give_the_fold_up(self, crash: bool) -> None:
        """Its sum is not finite."""
        with self.store.reading() as tx:
            round_ = tx.latest_round(self.task.id, MAIN)
        if round_ is not None and round_.state is RoundState.FOLDING:
            lifecycle = self.coordinator.lifecycle
            self._transact(lambda tx: lifecycle.give_up_fold(tx, self.now, round_, "no sum"), crash=crash)

    def _sum(self, tx: Any, round_: Round) -> Fold:
        updates = list(tx.updates(self.task.id, MAIN, round_.number, UpdateState.ACCEPTED))
        total = sum(int(payload.split()[1]) for payload in tx.payloads(updates))
        return Fold(
            task_id=self.task.id,
            round_number=round_.number,
            sha256=hashlib.sha256(f"{round_.version_number} {total}".encode()).hexdigest(),
            updates=tuple(update.lease_id for update in updates),
            examples=len(updates),
            loss_first=1.0,
            loss_last=0.5,
            variants={},
            server_state=hashlib.sha256(b"state").hexdigest(),
            report={},
        )

    @rule(state=st.sampled_from([TaskState.ACTIVE, TaskState.ACTIVE, TaskState.PAUSED]))
    def pause_or_resume(self, state: TaskState) -> None:
        self.paused = state is TaskState.PAUSED
        lifecycle = self.coordinator.lifecycle
        self._transact(lambda tx: lifecycle.set_active(tx, self.now, self.name, state, "operator"))

    def stop(self) -> None:
        self._transact(lambda tx: self.coordinator.lifecycle.stop(tx, self.now, self.name, "operator"))
        self.ended = True

    @rule(by=st.sampled_from(["release", "hold", *VERDICTS]))
    def judge(self, by: str | float) -> None:
        """Settle a candidate: what stood before one that is held follows it."""
        lifecycle, newest = self._releases(), self._newest()
        number = newest.number
        if by == "release":
            answer = self._transact(lambda tx: lifecycle.release(tx, self.now, self.name, number))
        elif by == "hold":
            answer = self._transact(lambda tx: lifecycle.hold(tx, self.now, self.name, number, "operator"))
        else:
            verdict = VERDICTS[float(by)]
            answer = self._transact(lambda tx: lifecycle.judge(tx, self.now, self.name, number, verdict))
        if newest.state is not VersionState.CANDIDATE:
            assert is_refused(answer, Code.CONFLICT)
            return
        held = by in {"hold", max(VERDICTS)}
        assert isinstance(answer, Version)
        assert answer.state is (VersionState.HELD if held else VersionState.RELEASED)
        assert self._newest().sha256 == (self._version(number - 1) if held else newest).sha256

    @rule(back=st.integers(0, 4), release=st.booleans())
    def roll_back(self, back: int, release: bool) -> None:
        lifecycle = self._releases()
        number = max(0, self._newest().number - back)
        if release:
            self._transact(lambda tx: lifecycle.release(tx, self.now, self.name, number))
        newest, source = self._newest(), self._version(number)
        answer = self._transact(lambda tx: lifecycle.roll_back(tx, self.now, self.name, number))
        if source.sha256 == newest.sha256 or source.state is VersionState.HELD:
            assert is_refused(answer, Code.CONFLICT)
        else:
            assert (answer.sha256, answer.state) == (source.sha256, VersionState.RELEASED)
            assert answer.number == newest.number + 1

    def _version(self, number: int) -> Version:
        with self.store.reading() as tx:
            return promised(tx.version(self.task.id, MAIN, number), "a version")

    def _newest(self) -> Version:
        with self.store.reading() as tx:
            return promised(tx.latest_version(self.task.id, MAIN), "version 0")

    def _releases(self) -> Releases:
        lifecycle = self.coordinator.lifecycle
        assert isinstance(lifecycle, Releases)
        return lifecycle
