"""A server whose task trains in groups, and devices that do as they are told, without model or clock."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import numpy as np
from msgspec.structs import replace

from aggregator.coordinator import Coordinator
from aggregator.folding import server_state, sum_round
from aggregator.lifecycle import Lifecycle
from aggregator.update_check import check_update
from aggregator.uploads import Admission, Upload
from fedtt.algorithms import HierFedTT
from fedtt.codec import CodecSpec, encode_delta
from fedtt.errors import WireError
from fedtt.label_counts import encode_label_counts
from fedtt.layout import LiveSet
from fedtt.manifest import Manifest
from fedtt.messages import CheckIn, CheckInAnswer, Enroll, Enrolled, Problem, Receipt, Work
from fedtt.planning import plan_adapter, plan_head, plan_tt
from fedtt.task import RoundSpec, TaskSpec
from fedtt.wire import UpdateHeader, decode_theta, encode_theta, encode_update, layout_tag
from storage.blobs import MemoryBlobs, load, save
from storage.memory import MemoryStore
from storage.records import Round, Task, Token, Version
from storage.store import Store
from tests.support.tiny import add_task, tiny_manifest

__all__ = ["ADAPTER", "GroupedServer", "grouped_task"]

LAYERS = 3
ADAPTER = plan_adapter(
    plan_tt(hidden=8, bottleneck=4, rank=2),
    hidden=8,
    layers=LAYERS,
    head=plan_head("dense", hidden=8, labels=2),
)
CODEC = CodecSpec(quantise="fp32")


def manifest() -> Manifest:
    return replace(tiny_manifest(), adapter=ADAPTER, layout_sha256=ADAPTER.layout.digest)


def grouped_task(rounds: dict[str, Any] | None = None, method: dict[str, Any] | None = None) -> TaskSpec:
    plain = {"count": 6, "cohort": 4, "deadline_s": 100.0, "lease_s": 50.0, "give_up_after": 4}
    return TaskSpec(
        name="groups",
        rounds=RoundSpec(**(plain | (rounds or {}))),
        codec=CODEC,
        method=HierFedTT(**({"groups": 2, "warmup_rounds": 1, "label_epsilon": 1.0} | (method or {}))),
    )


class GroupedServer:
    """A coordinator over a store, its sums, and a time that passes when told."""

    def __init__(self, spec: TaskSpec, store: Store | None = None, devices: int = 6) -> None:
        self.spec, self.now, self.leases = spec, 1000.0, 0
        self.store, self.blobs = store or MemoryStore(), MemoryBlobs()
        self.sums: dict[tuple[str, int], tuple[str, tuple[str, ...]]] = {}
        self.restart()
        save(self.blobs, encode_theta(np.zeros(ADAPTER.layout.size, np.float32)))
        with self.store.transaction() as tx:
            self.task_id = add_task(tx, spec, self.now, manifest()).id
            tx.put_token(Token(sha256=hashlib.sha256(b"t").hexdigest(), uses_left=None, expires_at=None))
        self.devices = [self.enroll(i) for i in range(devices)]

    def restart(self) -> None:
        """A new process over the same store."""
        lifecycle = Lifecycle(lambda version: server_state(self.blobs, version))
        self.coordinator = Coordinator(lifecycle, self._next_lease)

    def _next_lease(self) -> str:
        self.leases += 1
        return f"{self.leases:032x}"

    def write(self, change: Callable[[Any], Any]) -> Any:
        with self.store.transaction() as tx:
            return change(tx)

    def enroll(self, number: int) -> str:
        message = Enroll(public_key=hashlib.sha256(b"%d" % number).digest(), token="t", client="test")
        token = hashlib.sha256(b"t").hexdigest()
        answer = self.write(lambda tx: self.coordinator.enroll(tx, self.now, message, token))
        assert isinstance(answer, Enrolled)
        return answer.device

    def check_in(self, device: str) -> CheckInAnswer | Problem:
        message = CheckIn(client="test", runtimes=("onnxruntime",), examples=5)
        answer: CheckInAnswer | Problem = self.write(
            lambda tx: self.coordinator.check_in(tx, self.now, device, message)
        )
        return answer

    def upload(
        self,
        device: str,
        work: Work,
        value: float,
        labels: tuple[int, int] | None = None,
        losses: tuple[float, float] = (1.0, 0.8),
    ) -> Receipt | Problem:
        """The delta is `value` for all live numbers; losses are of the first step and the last.

        labels: that are told, or of a task which estimates them moves the bias as they would.
        """
        live = LiveSet(ADAPTER.layout, work.plan.live)
        delta = np.full(live.size, value, np.float32)
        estimated = isinstance(self.spec.method, HierFedTT) and self.spec.method.label_source == "updates"
        if labels and estimated:
            delta[-2:] = self.spec.training.learning_rate * np.sign(np.subtract(labels, np.mean(labels)))
        payload = encode_delta(CODEC, live, delta, np.random.default_rng(0))
        header = UpdateHeader(
            layout=layout_tag(ADAPTER.layout),
            examples=5,
            steps=1,
            loss_first=losses[0],
            loss_last=losses[1],
            label_counts=encode_label_counts(labels) if labels and not estimated else b"",
        )
        digest = hashlib.sha256(f"{work.lease} {value}".encode()).hexdigest()
        admission = self.write(lambda tx: self.coordinator.admit(tx, device, work.lease, digest))
        if not isinstance(admission, Admission):
            assert isinstance(admission, Receipt | Problem)
            return admission
        if estimated:
            checked = check_update(encode_update(header, payload), admission.wanted)
            assert not isinstance(checked, Problem)
            header, payload = checked
        upload = Upload(admission=admission, digest=digest, header=header, payload=payload)
        answer: Receipt | Problem = self.write(lambda tx: self.coordinator.accept(tx, self.now, upload))
        return answer

    def tick(self, times: int = 2, *, crash_before_publish: bool = False) -> list[Version]:
        """What `Service.tick` does; returns the versions of this."""
        made = []
        for _ in range(times):
            for round_ in self.write(lambda tx: self.coordinator.lifecycle.advance(tx, self.now)):
                made += self._fold(round_, crash=crash_before_publish)
        return made

    def _fold(self, round_: Round, *, crash: bool) -> list[Version]:
        lifecycle = self.coordinator.lifecycle
        key = (round_.branch, round_.number)
        try:
            fold = sum_round(self.store, self.blobs, lifecycle, round_)
        except WireError as error:
            why = str(error)
            self.write(lambda tx: lifecycle.give_up_fold(tx, self.now, round_, why))
            return []
        found = (fold.sha256, fold.updates)
        assert self.sums.setdefault(key, found) == found  # the same ledger gives the same bits
        if crash:
            self.restart()
            return []
        version = self.write(lambda tx: lifecycle.publish(tx, self.now, fold))
        assert self.write(lambda tx: lifecycle.publish(tx, self.now, fold)) is None  # once
        return [version]

    def everyone(self, value: float = 0.1, *, labels: bool = True, seconds: float = 5.0) -> int:
        """Every device that gets work does it; returns how many did."""
        work = {device: self.check_in(device) for device in self.devices}
        self.now += seconds
        done = 0
        for number, (device, answer) in enumerate(work.items()):
            if isinstance(answer, Work):
                told = (9, 1) if number % 2 else (1, 9)
                assert isinstance(self.upload(device, answer, value, told if labels else None), Receipt)
                done += 1
        self.tick()
        return done

    def task(self) -> Task:
        with self.store.reading() as tx:
            task = tx.task_by_id(self.task_id)
        assert task is not None
        return task

    def versions(self, branch: str = "main") -> list[Version]:
        with self.store.reading() as tx:
            return [version for version in tx.versions(self.task_id) if version.branch == branch]

    def theta(self, version: Version) -> np.ndarray[Any, np.dtype[np.float32]]:
        return decode_theta(load(self.blobs, version.sha256), ADAPTER.layout, version.sha256)
