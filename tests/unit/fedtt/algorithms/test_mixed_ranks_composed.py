"""Methods of mixed ranks under every fold, server optimiser and age of a base, against slow formulas."""

from __future__ import annotations

import math
import tracemalloc
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pytest
from msgspec.structs import replace
from numpy.typing import NDArray

from fedtt.adapter import AdapterSpec
from fedtt.algorithms import FlexLoRA, Tier, TTSVDFedTT
from fedtt.algorithms.mixed_ranks import MixedRanks
from fedtt.errors import ConfigError
from fedtt.folds import Contribution, Fold, Krum, Mean, Median, TrimmedMean
from fedtt.layout import Theta
from fedtt.planning import plan_adapter, plan_lora, plan_tt
from fedtt.server_optimiser import ServerSpec, ServerState
from fedtt.server_step import Step, server_step
from fedtt.task import RoundSpec, TaskSpec
from fedtt.tensor_train import tt_dense, tt_svd
from tests.support.fold_oracle import folded_by_hand, one_number
from tests.support.ranks import at_rank, bases_of, device, lora_adapter, products, tt_adapter
from tests.support.trains import random_theta

Vector = NDArray[np.float64]
TIERS = (Tier(rank=1, below_mb=500), Tier(rank=2, below_mb=2000))


class Case(NamedTuple):
    method: MixedRanks
    adapter: AdapterSpec


CASES = {
    "tt-svd": Case(TTSVDFedTT(tiers=TIERS), tt_adapter()),
    "flexlora": Case(FlexLoRA(tiers=TIERS), lora_adapter()),
}
ROBUST: list[Fold] = [Median(), TrimmedMean(trim=0.2), Krum(), Krum(hostile=2, selected=2)]
FOLDS: list[Fold] = [Mean(), Mean(norm_bound=0.5), *ROBUST, Median(norm_bound=0.5)]
SERVERS = [
    ServerSpec(learning_rate=0.5),
    ServerSpec(optimiser="momentum"),
    ServerSpec(optimiser="adam"),
    ServerSpec(optimiser="yogi", learning_rate=0.05),
]
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
every_fold = pytest.mark.parametrize("fold", FOLDS, ids=lambda f: f"{type(f).__name__} {f.norm_bound or ''}")
every_server = pytest.mark.parametrize("server", SERVERS, ids=lambda s: s.optimiser)


def start(case: Case, seed: int = 0) -> Theta:
    return random_theta(case.adapter, seed) / np.float32(2)


def step(
    case: Case,
    theta: Theta,
    given: Sequence[Contribution],
    fold: Fold | None = None,
    server: ServerSpec | None = None,
    state: ServerState | None = None,
) -> Step:
    """Through the server's own step."""
    method, adapter = case
    rounds = RoundSpec(count=9, cohort=9, quorum=9)
    spec = TaskSpec(
        name="t", rounds=rounds, method=method, fold=fold or Mean(), server=server or ServerSpec()
    )
    live = method.live(adapter, 1)
    return server_step(spec, adapter, bases_of(method, adapter, theta), live, given, state)


def matrices(case: Case, adapter: AdapterSpec, theta: NDArray[np.floating[Any]]) -> dict[str, Vector]:
    """What the method averages as matrices: trains, or the pairs of LoRA, whose head is averaged as it is."""
    pairs = {pair.prefix for pair in adapter.lora_pairs}
    return {name: w for name, w in products(adapter, theta).items() if not pairs or name in pairs}


def loose(adapter: AdapterSpec, theta: NDArray[np.floating[Any]]) -> Vector:
    """All numbers of no matrix."""
    if adapter.lora_pairs:
        return theta[adapter.adapter_size :].astype(np.float64)
    taken = {index for train in adapter.tt_matrices for index in train.indices}
    rest = [s for i, s in enumerate(adapter.layout.slices) if i not in taken]
    return np.concatenate([theta[s] for s in rest]).astype(np.float64)


def meaning(case: Case, adapter: AdapterSpec, theta: NDArray[np.floating[Any]]) -> Vector:
    parts = [*matrices(case, adapter, theta).values(), loose(adapter, theta)]
    return np.concatenate([part.reshape(-1) for part in parts])


def changes(case: Case, theta: Theta, given: Sequence[Contribution], fold: Fold) -> list[Vector]:
    """W(θ_{r_k} + Δ_k) less W(θ_{r_k}), or for FlexLoRA's mean less W(θ) at the adapter's own rank.

    Of the latter the former is what a bound bounds.
    """
    found = []
    for c in given:
        bases: Mapping[int | None, Theta] = c.bases or bases_of(case.method, case.adapter, theta)
        after = meaning(case, at_rank(case.adapter, c.rank), bases[c.rank].astype(np.float64) + c.delta)
        change = after - meaning(case, at_rank(case.adapter, c.rank), bases[c.rank])
        if fold.norm_bound is not None:
            change = change * min(1.0, fold.norm_bound / max(float(np.linalg.norm(change)), 1e-30))
        if isinstance(case.method, FlexLoRA) and isinstance(fold, Mean):
            change = change + meaning(case, at_rank(case.adapter, c.rank), bases[c.rank])
            change = change - meaning(case, case.adapter, bases[None])
        found.append(change)
    return found


def folded_changes(case: Case, theta: Theta, given: Sequence[Contribution], fold: Fold) -> Vector:
    rows = [change.tolist() for change in changes(case, theta, given, fold)]
    return np.array(folded_by_hand(replace(fold, norm_bound=None), rows, given))


def check_moved(case: Case, before: Theta, change: Vector, after: Theta) -> None:
    """after is what TT-SVD or SVD makes of W(before) + change."""
    goals, at = matrices(case, case.adapter, before), 0
    found = matrices(case, case.adapter, after)
    for name, matrix in goals.items():
        goal = matrix + change[at : at + matrix.size].reshape(matrix.shape)
        at += matrix.size
        expected = cut(case, name, goal)
        np.testing.assert_allclose(found[name], expected, atol=3e-5 * float(np.linalg.norm(goal)))
    others = loose(case.adapter, before) + change[at:]
    np.testing.assert_allclose(loose(case.adapter, after), others, rtol=1e-5, atol=1e-5)


def cut(case: Case, name: str, goal: Vector) -> Vector:
    if case.adapter.lora_pairs:
        u, s, vt = np.linalg.svd(goal, full_matrices=False)
        return np.asarray((u[:, :3] * s[:3]) @ vt[:3])
    (train,) = (train for train in case.adapter.tt_matrices if train.prefix == name)
    return np.asarray(tt_dense(tt_svd(goal, train.matrix), train.matrix.split))


def some_devices(
    case: Case, seed: int = 0, older: Sequence[Theta] = (), count: int = 7
) -> list[Contribution]:
    """Of mixed ranks, and of mixed ages where there are older versions (the newest first)."""
    rng, found = np.random.default_rng(seed), []
    for number in range(count):
        rank, size = [None, 1, 2][number % 3], float(rng.choice([0.02, 0.1]))
        one = device(case.adapter, rank, seed * 100 + number, size, examples=int(rng.integers(1, 50)))
        age = int(rng.integers(0, len(older) + 1))
        if age:
            bases = bases_of(case.method, case.adapter, older[age - 1])
            one = replace(one, staleness=age, bases=bases)
        found.append(one)
    return found


@every_case
@every_fold
@pytest.mark.parametrize("stale", [False, True], ids=["", "stale"])
def test_a_fold_is_of_the_changes_of_matrices_each_against_its_own_base(
    case: Case, fold: Fold, stale: bool
) -> None:
    older = [start(case, seed) for seed in (7, 8, 9)] if stale else []
    given = some_devices(case, 1, older)
    assert len({c.staleness for c in given}) >= (3 if stale else 1)
    theta = start(case)
    expected = folded_changes(case, theta, given, fold)
    assert np.abs(expected).max() > 1e-3
    check_moved(case, theta, expected, step(case, theta, given, fold).theta)


@every_case
def test_a_bound_is_of_what_a_device_trained_and_not_of_what_its_rank_cannot_hold(case: Case) -> None:
    theta, bound = start(case), Mean(norm_bound=0.5)
    honest = [device(case.adapter, rank, seed, 0.001) for seed, rank in enumerate([None, 1, 2])]
    trained = changes(case, theta, honest, Median())
    assert max(map(np.linalg.norm, trained)) < 0.25
    free, bounded = step(case, theta, honest, Mean()), step(case, theta, honest, bound)
    np.testing.assert_allclose(bounded.theta, free.theta, rtol=1e-4, atol=1e-5)
    for rank in (None, 1):
        hostile = device(case.adapter, rank, 9, 5.0)
        idle = device(case.adapter, rank, 9, 0.0)
        moved = folded_changes(case, theta, [hostile], bound) - folded_changes(case, theta, [idle], bound)
        assert np.linalg.norm(moved) == pytest.approx(0.5)
        check_moved(
            case,
            theta,
            folded_changes(case, theta, [hostile], bound),
            step(case, theta, [hostile], bound).theta,
        )


@every_case
@every_server
@pytest.mark.parametrize("fold", [Mean(), Median()], ids=["mean", "median"])
def test_a_server_optimiser_goes_its_way_with_every_entry_of_the_matrices(
    case: Case, server: ServerSpec, fold: Fold
) -> None:
    theta, state, folds = start(case), None, list[list[float]]()
    for number in range(3):
        given = some_devices(case, number)
        folds.append(folded_changes(case, theta, given, fold).tolist())
        expected = np.array([one_number(server, column)[-1] for column in zip(*folds, strict=True)])
        found = step(case, theta, given, fold, server, state)
        check_moved(case, theta, expected, found.theta)
        theta, state = found.theta, found.state


@every_case
@every_server
def test_moments_do_not_depend_on_which_factors_stand_for_the_matrices(
    case: Case, server: ServerSpec
) -> None:
    """The same matrices as other factors: twice as large before a bond, and half behind it."""
    theta = start(case)
    first = step(case, theta, some_devices(case), server=server)
    layout, groups = case.adapter.layout, [(p.a, p.b) for p in case.adapter.lora_pairs]
    groups = groups or [(t.indices[0], t.indices[1]) for t in case.adapter.tt_matrices]
    other = first.theta.copy()
    for one, next_ in groups:
        other[layout.slices[one]] *= 2
        other[layout.slices[next_]] /= 2
    idle = [device(case.adapter, None, size=0.0)] * 3
    ours = step(case, first.theta, idle, server=server, state=first.state).theta
    theirs = step(case, other, idle, server=server, state=first.state).theta
    for name, matrix in matrices(case, case.adapter, ours).items():
        atol = 1e-5 * float(np.linalg.norm(matrix))
        np.testing.assert_allclose(matrices(case, case.adapter, theirs)[name], matrix, atol=atol)


@every_case
def test_a_task_that_ran_before_moments_were_of_matrices_goes_on(case: Case) -> None:
    """Its state knows the norm of each factor, of which there are more than matrices."""
    factors = len(case.adapter.layout.factors)
    empty = np.zeros(0, np.float32)
    before = ServerState(first=empty, second=empty, norms=np.ones(factors, np.float32))
    theta, given = start(case), some_devices(case)
    found = step(case, theta, given, state=before)
    assert found.theta.tobytes() == step(case, theta, given).theta.tobytes()


@every_case
@pytest.mark.parametrize("fold", ROBUST, ids=lambda f: type(f).__name__)
def test_idle_devices_of_low_ranks_change_nothing_under_a_robust_fold_however_many(
    case: Case, fold: Fold
) -> None:
    """A median of FlexLoRA's products would have the ranks of the majority after one round."""
    theta, ranks = start(case), [1, 1, 1, 1, 1, None, None]
    given = [device(case.adapter, rank, size=0.0) for rank in ranks]
    assert step(case, theta, given, fold).theta.tobytes() == theta.tobytes()


@every_case
def test_a_stale_update_that_moved_nothing_moves_nothing(case: Case) -> None:
    theta, older = start(case), bases_of(case.method, case.adapter, start(case, 5))
    rank = None if isinstance(case.method, FlexLoRA) else 1
    idle = replace(device(case.adapter, rank, size=0.0), staleness=2, bases=older)
    assert step(case, theta, [idle] * 3).theta.tobytes() == theta.tobytes()


@every_case
@pytest.mark.parametrize("fold", ROBUST, ids=lambda f: type(f).__name__)
@pytest.mark.parametrize("size", [10.0, 3e38])
def test_one_hostile_device_moves_a_robust_fold_no_further_than_the_honest_ones_go(
    case: Case, fold: Fold, size: float
) -> None:
    theta, honest = start(case), some_devices(case, 3, count=6)
    hostile = Contribution(delta=np.full(case.adapter.layout.size, size, np.float32), examples=1)
    found = step(case, theta, [hostile, *honest], fold)
    assert found.is_finite
    rows = np.array(changes(case, theta, honest, fold))
    check_within(case, theta, found.theta, rows)


def check_within(case: Case, theta: Theta, after: Theta, rows: Vector) -> None:
    """What moved is no longer than the entries furthest out, and what rounding may add."""
    furthest, moved = np.abs(rows).max(axis=0), meaning(case, case.adapter, after)
    moved = moved - meaning(case, case.adapter, theta)
    assert np.linalg.norm(moved) < 2 * np.linalg.norm(furthest)


@pytest.mark.parametrize("fold", [Median(), Krum(), Mean(norm_bound=1.0)], ids=lambda f: type(f).__name__)
def test_products_beyond_the_largest_float_count_as_the_greatest_an_update_may_have(fold: Fold) -> None:
    """Ten cores of 3e38 each are 1e385."""
    modes: dict[str, Any] = {"hidden_modes": (2,) * 5, "bottleneck_modes": (2,) * 5}
    adapter = plan_adapter(
        plan_tt(hidden=32, bottleneck=32, rank=2, sites=("mlp",), **modes), hidden=32, layers=1, head=None
    )
    case = Case(TTSVDFedTT(), adapter)
    hostile = Contribution(delta=np.full(adapter.layout.size, 3e38, np.float32), examples=1)
    found = step(case, start(case), [hostile, *(device(adapter, None, s, 0.02) for s in range(6))], fold)
    assert found.is_finite
    assert np.abs(found.theta).max() < 100


@every_case
def test_a_robust_fold_of_matrices_takes_no_more_than_it_says(case: Case) -> None:
    method, live = case.method, case.method.live(case.adapter, 1)
    numbers, count = method.space(case.adapter, live).size, 150
    assert numbers > case.adapter.layout.size
    bases = bases_of(method, case.adapter, start(case))
    given = (device(case.adapter, [None, 1, 2][n % 3], n) for n in range(count))
    tracemalloc.start()
    try:
        method.fold(case.adapter, bases, live, given, Median())
        _, most_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert 0.3 < most_bytes / Median().needed_bytes(count, numbers) < 1.05


def test_a_task_whose_matrices_do_not_fit_into_memory_is_refused() -> None:
    """384 · 384 entries of each product and 24 bytes of each, 768 · r numbers of its factors."""
    adapter = plan_adapter(
        plan_lora({"query": (384, 384)}, rank=4, alpha=8.0, targets=("query",)),
        hidden=384,
        layers=2,
        head=None,
    )
    rounds = RoundSpec(count=3, cohort=100, quorum=3)
    task = TaskSpec(name="t", rounds=rounds, method=FlexLoRA(), fold=Median(memory_mb=700))
    needed = math.ceil(100 * 24 * 2 * 384 * 384 / 1e6)  # 708
    with pytest.raises(
        ConfigError, match=rf"fold\.memory_mb = 700 is not allowed: at least {needed}, for 100"
    ):
        task.check(adapter)
    replace(task, fold=Median(memory_mb=needed)).check(adapter)
    replace(task, fold=Mean()).check(adapter)


@every_server
def test_blocks_that_are_not_trained_keep_their_bits_and_their_moments(server: ServerSpec) -> None:
    adapter = plan_adapter(
        plan_lora({"query": (6, 6)}, rank=2, alpha=4.0, targets=("query",)), hidden=6, layers=3, head=None
    )
    method = FlexLoRA()
    theta, live = random_theta(adapter, 0), adapter.live_at(1, adapter.layout.everything)
    spec = TaskSpec(name="t", rounds=RoundSpec(count=9, cohort=9), method=method, server=server)
    state = None
    for seed in range(2):
        delta = np.random.default_rng(seed).standard_normal(live.size).astype(np.float32)
        given = [Contribution(delta=delta, examples=1)]
        found = server_step(spec, adapter, {None: theta}, live, given, state)
        still = np.setdiff1d(np.arange(adapter.layout.size), live.positions)
        assert found.theta[still].tobytes() == theta[still].tobytes()
        assert (found.theta[live.positions] != theta[live.positions]).any()
        theta, state = found.theta, found.state
    assert state is not None
    assert not state.first[: 2 * 36].any()  # two blocks of 6 · 6
    assert np.isnan(state.norms[:2]).all()
