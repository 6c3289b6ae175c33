from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import pytest
from msgspec.structs import replace
from numpy.typing import NDArray

from fedtt.algorithms import RoLoRA
from fedtt.errors import ConfigError
from fedtt.folds import Contribution
from fedtt.layout import Theta
from fedtt.server_optimiser import ServerState
from fedtt.server_step import server_step
from fedtt.task import RoundSpec, TaskSpec, TrainingSpec, parse_task
from tests.support.ranks import lora_adapter, products
from tests.support.trains import random_theta

ADAPTER = lora_adapter()
OF_A, OF_B = {p.a for p in ADAPTER.lora_pairs}, {p.b for p in ADAPTER.lora_pairs}
ALL = set(range(len(ADAPTER.layout.factors)))
SPEC = TaskSpec(name="t", rounds=RoundSpec(count=9, cohort=1), method=RoLoRA())

TASK = """
name = "t"
[rounds]
count = 9
cohort = 2
buffer = 1
max_staleness = 3
[method]
name = "rolora"
epoch_rounds = 4
"""
Matrix = NDArray[np.floating[Any]]


def live(round_number: int, state: ServerState | None) -> set[int]:
    return set(RoLoRA().live(ADAPTER, round_number, state).indices)


def test_over_rounds_that_are_folded_b_and_a_take_turns_and_each_mean_is_exact() -> None:
    theta, state, rng = random_theta(ADAPTER, 0), None, np.random.default_rng(1)
    for round_number in range(1, 6):
        chosen = RoLoRA().live(ADAPTER, round_number, state)
        assert set(chosen.indices) == ALL - (OF_A if round_number % 2 else OF_B)
        given_ = [
            Contribution(delta=rng.standard_normal(chosen.size).astype(np.float32), examples=n)
            for n in (2, 6)
        ]
        sent = [products(ADAPTER, theta + chosen.scatter(c.delta)) for c in given_]
        step = server_step(SPEC, ADAPTER, {None: theta}, chosen, given_, state)
        theta, state = step.theta, step.state
        for pair in ADAPTER.lora_pairs:
            mean = 0.25 * sent[0][pair.prefix] + 0.75 * sent[1][pair.prefix]
            np.testing.assert_allclose(products(ADAPTER, theta)[pair.prefix], mean, rtol=1e-4, atol=1e-4)


def test_b_stays_live_until_it_has_been_folded_for_rounds_may_be_abandoned() -> None:
    """While B is zero, A has no gradient: an even round would train nothing but the head."""
    assert live(2, None) == live(4, None) == ALL - OF_A
    none = np.zeros(0, np.float32)
    unseen = ServerState(first=none, second=none, norms=np.full(len(ALL), np.nan, np.float32))
    assert live(2, unseen) == ALL - OF_A
    seen = ServerState(first=none, second=none, norms=np.ones(len(ALL), np.float32))
    assert live(2, seen) == ALL - OF_B
    assert live(3, seen) == ALL - OF_A


def test_the_factors_take_turns_in_the_blocks_that_are_trained_though_those_below_never_are() -> None:
    adapter = replace(ADAPTER, layers=2, depth=2)
    spec = replace(SPEC, training=TrainingSpec(depth=1))
    head = len(ADAPTER.layout.factors) - 4  # of two pairs, A and B each
    theta, state = random_theta(adapter, 0), None
    for round_number in range(1, 6):
        chosen = spec.live(adapter, round_number, state)
        pairs = {pair for pair in adapter.lora_pairs if {pair.a, pair.b} & set(chosen.indices)}
        assert {pair.prefix for pair in pairs} == {"block.1.query", "block.1.value"}
        trained = {pair.b if round_number % 2 else pair.a for pair in pairs}
        assert set(chosen.indices) == trained | set(range(8, 8 + head))
        given_ = [Contribution(delta=np.ones(chosen.size, np.float32), examples=1)]
        step = server_step(spec, adapter, {None: theta}, chosen, given_, state)
        theta, state = step.theta, step.state


def test_a_turn_lasts_as_many_rounds_as_it_is_told_and_is_one_gauge() -> None:
    method, seen = RoLoRA(epoch_rounds=3), moved()
    for t in range(1, 13):
        turn = sum(later % 3 == 1 for later in range(2, t + 1))  # turns that began after the first
        assert set(method.live(ADAPTER, t, seen).indices) == ALL - (OF_B if turn % 2 else OF_A)
        for later in range(t, 13):
            between = any(number % 3 == 1 for number in range(t + 1, later + 1))
            assert method.same_gauge(t, later) is not between


def moved() -> ServerState:
    """As after folds that moved every factor."""
    none = np.zeros(0, np.float32)
    return ServerState(first=none, second=none, norms=np.ones(len(ALL), np.float32))


@pytest.mark.parametrize(("first", "late"), [(1, 3), (4, 6)])
def test_changes_from_older_bases_of_a_turn_fold_into_the_mean_of_the_matrices_changes(
    first: int, late: int
) -> None:
    """Of B and of A; folded a turn later the same deltas come to something else."""
    spec = replace(SPEC, method=RoLoRA(epoch_rounds=3))
    rng, start = np.random.default_rng(2), random_theta(ADAPTER, 0)
    chosen = spec.method.live(ADAPTER, first, moved())
    steps = [rng.standard_normal(chosen.size).astype(np.float32) for _ in range(4)]
    bases = [start, start + chosen.scatter(steps[0]), start + chosen.scatter(steps[0] + steps[1])]
    given_ = [Contribution(delta=steps[2], examples=3), Contribution(delta=steps[3], examples=1)]

    def folded(theta: Theta) -> tuple[dict[str, Matrix], dict[str, Matrix]]:
        """How the matrices changed, and the mean of how each changed at the base its device trained from."""
        after = server_step(spec, ADAPTER, {None: theta}, chosen, given_, moved()).theta
        found, expected = change(theta, after), dict[str, Matrix]()
        for base, contribution in zip(bases, given_, strict=False):
            at_device = change(base, base + chosen.scatter(contribution.delta))
            for pair in ADAPTER.lora_pairs:
                share = contribution.examples / 4 * at_device[pair.prefix]
                expected[pair.prefix] = expected.get(pair.prefix, 0.0) + share
        return found, expected

    assert spec.method.same_gauge(first, late)
    for pair in ADAPTER.lora_pairs:
        found, expected = folded(bases[2])
        np.testing.assert_allclose(found[pair.prefix], expected[pair.prefix], atol=1e-4)
    other = spec.method.live(ADAPTER, late + 1, moved())
    assert other.indices != chosen.indices
    later = bases[2] + other.scatter(rng.standard_normal(other.size).astype(np.float32))
    for pair in ADAPTER.lora_pairs:
        found, expected = folded(later)
        assert np.abs(found[pair.prefix] - expected[pair.prefix]).max() > 0.1


def change(before: Theta, after: Theta) -> dict[str, Matrix]:
    ends = products(ADAPTER, after.astype(np.float64)), products(ADAPTER, before.astype(np.float64))
    return {pair.prefix: ends[0][pair.prefix] - ends[1][pair.prefix] for pair in ADAPTER.lora_pairs}


def test_a_task_may_be_asynchronous() -> None:
    assert parse_task(TASK).method == RoLoRA(epoch_rounds=4)
    with pytest.raises(ConfigError, match=r"method\.epoch_rounds = 0 .*>= 1"):
        parse_task(TASK.replace("= 4", "= 0"))


def test_a_plan_with_turns_of_a_round_goes_out_as_it_did_before_there_were_others() -> None:
    assert msgspec.to_builtins(RoLoRA()) == {"name": "rolora"}
