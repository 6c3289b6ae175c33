"""A state machine over the coordinator: devices, a server that crashes, and time, in any order.

Devices keep the error-feedback bookkeeping of the design with whole numbers in place of vectors: local
training yields a number, the wire carries multiples of 4, the rest is the residual. So exactness can be
asserted with ==: on every device what was trained under acknowledged leases equals what was sent under
them plus the committed residual.
"""

from __future__ import annotations

from hypothesis import strategies as st
from hypothesis.stateful import rule

from storage.records import TaskState
from tests.property.machine_devices import DeviceMachine
from tests.property.machine_server import VERDICTS
from tests.property.machine_state import (
    DEVICES,
)

__all__ = ["CoordinatorMachine"]

MISHAPS = ["none", "none", "none", "answer lost", "stolen", "slow", "crash", "receipt lost", "late"]


class CoordinatorMachine(DeviceMachine):
    """All rules, and whole rounds of them; subclasses name the store."""

    @rule(
        change=st.integers(-50, 50),
        mishaps=st.lists(st.sampled_from(MISHAPS), min_size=DEVICES, max_size=DEVICES),
        sleepers=st.integers(0, 2),
        wait_s=st.sampled_from([0.0, 16.0, 70.0]),
        between=st.sampled_from(["", "", "leave", "erase", "restart", "pause", "roll back", "stop"]),
        fold=st.sampled_from(["once", "twice", "crash", "later", "given up"]),
        verdict=st.sampled_from([min(VERDICTS), min(VERDICTS), max(VERDICTS), None]),
    )
    def go_round(
        self,
        change: int,
        mishaps: list[str],
        sleepers: int,
        wait_s: float,
        between: str,
        fold: str,
        verdict: float | None,
    ) -> None:
        """A whole round with what can go wrong in it; a walk of single steps would seldom reach a fold."""
        self.pause_or_resume(TaskState.ACTIVE)
        for i, mishap in enumerate(mishaps):
            self.check_in(i, crash=False, lost=mishap == "answer lost")
            if mishap == "stolen":
                self.send_under_anothers_lease((i + 1) % DEVICES, i)
            self.train(i, change + i)
            if mishap != "slow" and i >= sleepers:
                self.upload(i, crash=mishap == "crash", lost=mishap == "receipt lost", late=mishap == "late")
        self.let_time_pass(wait_s)
        self.advance(crash=False)
        self._between(between)
        if fold == "given up":
            self.give_the_fold_up(crash=False)
        elif fold != "later":
            self.fold(crash=fold == "crash", twice=fold == "twice")
        if verdict is not None:
            self.judge(verdict)

    def _between(self, what: str) -> None:
        """What comes between the claim of a round and its sum."""
        match what:
            case "leave" | "erase":
                self.leave(0, erase=what == "erase")
            case "restart":
                self.restart()
            case "pause":
                self.pause_or_resume(TaskState.PAUSED)
            case "roll back":
                self.roll_back(2, release=False)
            case "stop":
                self.stop()
