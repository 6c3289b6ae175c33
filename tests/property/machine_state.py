"""What the state machine knows: its devices, the store, and the time."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

from aggregator.coordinator import Coordinator
from aggregator.releases import Releases
from aggregator.uploads import Admission, Upload
from fedtt.evaluation import EvaluationSpec
from fedtt.messages import (
    Code,
    Problem,
    Receipt,
    Work,
)
from fedtt.sampling import Uniform
from fedtt.task import RoundSpec, TaskSpec
from fedtt.wire import UpdateHeader
from storage.records import Token
from storage.store import Store
from tests.support.tiny import add_task

__all__ = ["DEVICES", "CrashError", "MachineState", "ModelDevice", "digest_of", "is_refused", "upload_of"]

DEVICES = 6
HEADER = UpdateHeader(layout=b"\0" * 8, examples=1, steps=1, loss_first=1.0, loss_last=0.5)


class CrashError(Exception):
    """The server process dies inside a transaction."""


@dataclass
class ModelDevice:
    """One device's durable state, and what a perfect observer knows of it."""

    key: bytes
    id: str = ""
    nonce: int = 0  #: of its last request that the ledger has seen
    erased: bool = False  #: at its owner's wish, and not enrolled again since
    lease: Work | None = None
    frame: bytes | None = None  #: stored before it is sent
    next_residual: int = 0
    residual: int = 0
    trained: int = 0  #: of the stored frame
    acknowledged_trained: int = 0
    acknowledged_sent: int = 0
    old_frames: dict[str, bytes] = field(default_factory=dict)


def is_refused(answer: object, code: Code) -> bool:
    """Whether it is a refusal of this kind."""
    return isinstance(answer, Problem) and answer.code is code


def digest_of(frame: bytes) -> str:
    return hashlib.sha256(frame).hexdigest()


def upload_of(admission: Admission, frame: bytes) -> Upload:
    return Upload(admission=admission, digest=digest_of(frame), header=HEADER, payload=frame)


class MachineState(RuleBasedStateMachine):
    """Subclasses name the store."""

    make_store: Callable[[], Store]
    drop_store: Callable[[Store], None] = staticmethod(lambda store: store.close())

    @initialize(
        cohort=st.integers(1, 5),
        buffer=st.integers(1, 5),
        quorum=st.integers(1, 5),
        staleness=st.integers(0, 2),
        count=st.integers(1, 8),
        separation=st.sampled_from([0, 0, 1, 2]),
        cap=st.sampled_from([None, None, 1, 2]),
        give_up_after=st.sampled_from([1, 1, 3]),
        judged=st.booleans(),
    )
    def start(
        self,
        cohort: int,
        buffer: int,
        quorum: int,
        staleness: int,
        count: int,
        separation: int,
        cap: int | None,
        give_up_after: int,
        judged: bool,
    ) -> None:
        self.now = 1000.0
        self.nonce = 0
        self.paused = self.ended = False  # by its operator; for good
        self.store = type(self).make_store()
        buffer = min(buffer, cohort)
        rounds = RoundSpec(
            count=count,
            cohort=cohort,
            buffer=buffer,
            quorum=min(quorum, buffer),
            deadline_s=60.0,
            lease_s=20.0,
            max_staleness=staleness,
            give_up_after=give_up_after,
        )
        sampling = Uniform(separation=separation, participation_cap=cap)
        evaluation = EvaluationSpec(by="file", deadline_s=50.0) if judged else None
        self.spec = TaskSpec(name="machine", rounds=rounds, sampling=sampling, evaluation=evaluation)
        self.devices = [ModelDevice(key=bytes([i]) * 32) for i in range(DEVICES)]
        self.receipts: dict[str, Receipt] = {}
        self.lease_ids = 0
        with self.store.transaction() as tx:
            self.task = add_task(tx, self.spec, self.now)
            tx.put_token(Token(sha256=digest_of(b"secret"), uses_left=None, expires_at=None))
        self.begin()

    def begin(self) -> None:
        """All is ready but for whom a subclass adds."""
        self.restart()

    @rule()
    def restart(self) -> None:
        """A new process over the same store: the coordinator keeps nothing in memory."""
        self.coordinator = Coordinator(Releases(), self._next_lease_id)

    def _next_lease_id(self) -> str:
        self.lease_ids += 1
        return f"{self.lease_ids:032x}"

    def teardown(self) -> None:
        if hasattr(self, "store"):
            type(self).drop_store(self.store)

    def _transact(self, change: Callable[[Any], Any], *, crash: bool = False) -> Any:
        try:
            with self.store.transaction() as tx:
                answer = change(tx)
                if crash:
                    raise CrashError
        except CrashError:
            self.restart()
            return None
        return answer

    @property
    def name(self) -> str:
        return self.spec.name
