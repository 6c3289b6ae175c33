"""Rounds whose sum makes no version, and sums themselves."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
from msgspec.structs import replace

from aggregator.folding import sum_round
from aggregator.lifecycle import Lifecycle
from aggregator.promised import promised
from fedtt.codec import CodecSpec, encode_delta
from fedtt.errors import StorageError, WireError
from fedtt.layout import LiveSet
from fedtt.task import RoundSpec, TaskSpec
from fedtt.wire import encode_theta
from storage.blobs import MemoryBlobs, load, save
from storage.memory import MemoryStore
from storage.records import MAIN, Round, RoundState, Task, TaskState, UpdateState
from tests.support import ledger
from tests.support.tiny import add_task, tiny_spec

LAYOUT = tiny_spec().layout
LIVE = LAYOUT.everything
CODEC = CodecSpec(quantise="fp32")
GREATEST = float(np.finfo(np.float32).max)


class Claimed:
    """A ledger with one round that waits for its sum."""

    def __init__(self, values: list[float], examples: list[int], give_up_after: int = 1) -> None:
        self.store, self.blobs, self.lifecycle = MemoryStore(), MemoryBlobs(), Lifecycle()
        spec = RoundSpec(count=9, cohort=9, give_up_after=give_up_after)
        save(self.blobs, encode_theta(np.zeros(LAYOUT.size, np.float32)))
        with self.store.transaction() as tx:
            task = add_task(tx, TaskSpec(name="t", rounds=spec, codec=CODEC))
            open_round = self.lifecycle.ensure_round(tx, 1.0, task)
            assert open_round is not None
            self.round: Round = replace(open_round, state=RoundState.FOLDING)
            tx.put_round(self.round)
            for number, (value, count) in enumerate(zip(values, examples, strict=True)):
                delta = np.full(LIVE.size, value, np.float32)
                payload = encode_delta(CODEC, LiveSet(LAYOUT, LIVE.indices), delta, np.random.default_rng(0))
                ledger.upload(tx, number, payload=payload, examples=count, loss_first=number, loss_last=0.0)

    def task(self) -> Task:
        with self.store.reading() as tx:
            return promised(tx.task("t"), "the task")

    def states(self, count: int) -> list[UpdateState]:
        with self.store.reading() as tx:
            found = [tx.update(ledger.lease(number).id) for number in range(count)]
            return [promised(update, "an update").state for update in found]


def test_a_sum_weighs_by_examples_up_to_the_methods_bound_and_stores_what_it_makes() -> None:
    claimed = Claimed([1.0, 4.0, 0.0], [1, 3, 10**6])
    fold = sum_round(claimed.store, claimed.blobs, claimed.lifecycle, claimed.round)
    # (1·1 + 3·4 + 1000·0) / (1 + 3 + 1000) = 13 / 1004
    expected = encode_theta(np.full(LAYOUT.size, 13 / 1004, np.float32))
    assert load(claimed.blobs, fold.sha256) == expected
    assert fold.sha256 == hashlib.sha256(expected).hexdigest()
    assert fold.updates == tuple(ledger.lease(number).id for number in range(3))
    assert (fold.examples, fold.loss_first, fold.loss_last) == (1_000_004, 1.0, 0.0)  # (0 + 1 + 2) / 3 = 1


def test_a_sum_that_is_not_finite_is_an_error_and_stores_nothing() -> None:
    claimed = Claimed([GREATEST, GREATEST], [1, 1])
    with claimed.store.transaction() as tx:
        base = promised(tx.latest_version(1, MAIN), "version 0")
        start = save(claimed.blobs, encode_theta(np.full(LAYOUT.size, GREATEST, np.float32)))
        tx.add_version(replace(base, number=1, sha256=start))
        tx.put_round(replace(claimed.round, version_number=1))
    with pytest.raises(WireError, match="the sum of its 2 updates is not finite"):
        sum_round(claimed.store, claimed.blobs, claimed.lifecycle, replace(claimed.round, version_number=1))


@pytest.mark.parametrize(("give_up_after", "state"), [(1, TaskState.PAUSED), (2, TaskState.ACTIVE)])
def test_a_round_whose_sum_is_given_up_is_abandoned_with_the_reason(
    give_up_after: int, state: TaskState
) -> None:
    claimed = Claimed([1.0], [1], give_up_after)
    with claimed.store.transaction() as tx:
        claimed.lifecycle.give_up_fold(tx, 2.0, claimed.round, "no sum")
    assert claimed.states(1) == [UpdateState.DISCARDED]
    assert claimed.task().state is state
    with claimed.store.reading() as tx:
        newest = tx.rounds(1)
    if state is TaskState.ACTIVE:
        assert (newest[0].number, newest[0].state) == (2, RoundState.OPEN)
    assert (newest[-1].state, newest[-1].reason) == (RoundState.ABANDONED, "no sum")


@pytest.mark.parametrize("state", [TaskState.STOPPED, TaskState.PAUSED])
def test_only_an_active_task_pauses_itself(state: TaskState) -> None:
    claimed = Claimed([1.0], [1])
    with claimed.store.transaction() as tx:
        if state is TaskState.STOPPED:
            claimed.lifecycle.stop(tx, 2.0, "t", "operator")
        else:
            claimed.lifecycle.set_active(tx, 2.0, "t", state, "operator")
        claimed.lifecycle.give_up_fold(tx, 3.0, claimed.round, "no sum")
    assert (claimed.task().state, claimed.task().reason) == (state, "operator")
    assert claimed.states(1) == [UpdateState.DISCARDED]


@pytest.mark.parametrize("state", [RoundState.OPEN, RoundState.FOLDED])
def test_a_round_that_another_server_has_moved_on_is_left_alone(state: RoundState) -> None:
    claimed = Claimed([1.0], [1])
    with claimed.store.transaction() as tx:
        tx.put_round(replace(claimed.round, state=state))
        claimed.lifecycle.give_up_fold(tx, 2.0, claimed.round, "no sum")
    assert claimed.states(1) == [UpdateState.ACCEPTED]
    assert claimed.task().state is TaskState.ACTIVE


def test_a_damaged_ledger_is_named_with_what_it_lacks() -> None:
    with pytest.raises(StorageError, match="the ledger is damaged, it lacks a round's version: restore"):
        promised(None, "a round's version")
