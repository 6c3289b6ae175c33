"""Exact FedTT: what is exact and what is not, asserted on matrices written out entry by entry."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from fedtt.adapter import AdapterSpec
from fedtt.algorithms import ExactFedTT, FedTT, FedTTPlus, Gradient, Method, drive
from fedtt.algorithms.gauge import Gauge
from fedtt.codec import CodecSpec
from fedtt.errors import ConfigError, LayoutError
from fedtt.folds import Contribution, Fold, Krum, Mean, Median, TrimmedMean
from fedtt.layout import LiveSet, Theta
from fedtt.optimiser import Optimiser, TrainingSpec
from fedtt.planning import plan_adapter, plan_head, plan_tt
from fedtt.server_optimiser import ServerSpec, ServerState
from fedtt.server_step import Step, server_step
from fedtt.task import RoundSpec, TaskSpec
from tests.support.adapters import small_adapter
from tests.support.trains import cores_of, dense_matrices, long_adapter, random_theta

ADAPTER = long_adapter()  # trains of five cores, a head of four, and its bias
LAYOUT = ADAPTER.layout
DOWN, UP, HEAD = "block.0.attention.down", "block.0.attention.up", "head.weight"
Schedule = Literal["cyclic", "norm", "sweep", "alternate"]
SCHEDULES: tuple[Schedule, ...] = ("cyclic", "norm", "sweep", "alternate")

seeds = st.integers(0, 2**32 - 1)
methods = st.builds(ExactFedTT, schedule=st.sampled_from(SCHEDULES), orthogonal=st.booleans())


def norms(**rms: Sequence[float]) -> ServerState:
    """The state after folds that moved the cores of trains by these root mean squares, all others by 1."""
    sizes = np.array([factor.size for factor in LAYOUT.factors], np.float64)
    found = np.sqrt(sizes)
    for train in ADAPTER.tt_matrices:
        for index, value in zip(train.indices, rms.get(train.prefix.replace(".", "_"), ()), strict=False):
            found[index] = value * math.sqrt(sizes[index])
    empty = np.zeros(0, np.float32)
    return ServerState(first=empty, second=empty, norms=found.astype(np.float32))


def live_at(method: Method, t: int) -> LiveSet:
    """After at least one fold, which moved all cores alike."""
    return method.live(ADAPTER, t, norms())


def live_cores(method: Method, t: int, state: ServerState | None = None) -> dict[str, list[int]]:
    """train -> which of its cores are live, the first being 0."""
    live = set((live_at(method, t) if state is None else method.live(ADAPTER, t, state)).indices)
    assert len(LAYOUT.factors) - 1 in live  # the bias
    return {
        train.prefix: [k for k, index in enumerate(train.indices) if index in live]
        for train in ADAPTER.tt_matrices
    }


# what is exact


def folded(
    method: Method,
    theta: Theta,
    live: LiveSet,
    given_: Sequence[Contribution],
    fold: Fold | None = None,
    state: ServerState | None = None,
    server: ServerSpec | None = None,
) -> Step:
    spec = TaskSpec(
        name="t",
        rounds=RoundSpec(count=1, cohort=9, quorum=5),
        method=method,
        fold=fold or Mean(),
        server=server or ServerSpec(),
    )
    return server_step(spec, ADAPTER, {None: theta}, live, given_, state)


def some_deltas(live: LiveSet, seed: int, count: int = 3, scale: float = 1.0) -> list[Contribution]:
    rng = np.random.default_rng(seed)
    return [
        Contribution(
            delta=(scale * rng.standard_normal(live.size)).astype(np.float32),
            examples=int(rng.integers(1, 50)),
        )
        for _ in range(count)
    ]


def at_device(
    method: ExactFedTT | FedTT, theta: Theta, live: LiveSet, delta: NDArray[np.float32]
) -> NDArray[np.float64]:
    """The factors of the device that sent this delta, by what the delta means."""
    is_inner = isinstance(method, ExactFedTT) and method.orthogonal
    plain = Gauge(ADAPTER, theta, live).leave(delta) if is_inner else delta.astype(np.float64)
    return theta + live.scatter(plain)


def distance(one: dict[str, NDArray[np.float64]], other: dict[str, NDArray[np.float64]]) -> float:
    """The largest relative distance of two equally named matrices."""
    return max(float(np.linalg.norm(one[n] - other[n]) / np.linalg.norm(other[n])) for n in other)


def mean_of_matrices(
    method: ExactFedTT | FedTT, theta: Theta, live: LiveSet, given_: Sequence[Contribution]
) -> dict[str, NDArray[np.float64]]:
    total = sum(c.examples for c in given_)
    each = [dense_matrices(ADAPTER, at_device(method, theta, live, c.delta)) for c in given_]
    weighted = [{n: c.examples / total * m[n] for n in m} for c, m in zip(given_, each, strict=True)]
    return {n: np.sum([m[n] for m in weighted], axis=0) for n in each[0]}


@given(method=methods, t=st.integers(1, 40), seed=seeds)
@settings(deadline=None, max_examples=60)
def test_the_mean_of_each_matrix_is_exact_for_one_base_gauge_and_live_set(
    method: ExactFedTT, t: int, seed: int
) -> None:
    theta = random_theta(ADAPTER, seed)
    live = method.live(ADAPTER, t, norms(block_0_mlp_up=[1, 2, 1, 1, 1]))
    given_ = some_deltas(live, seed)
    step = folded(method, theta, live, given_)
    found, expected = dense_matrices(ADAPTER, step.theta), mean_of_matrices(method, theta, live, given_)
    for name, error_bound in _rounding(step.theta).items():
        assert np.linalg.norm(found[name] - expected[name]) < error_bound, name
    assert step.report == {"exact_mean": 1.0}


def _rounding(theta: Theta) -> dict[str, float]:
    """What storing the cores in float32 may do to each matrix: ‖W‖ ≤ Π_k ‖G_k‖."""
    return {
        prefix: 1e-6 * math.prod(float(np.linalg.norm(core)) for core in cores_of(ADAPTER, theta, prefix))
        for prefix, _, _ in ADAPTER.tt_matrices
    }


@pytest.mark.parametrize("orthogonal", [False, True])
def test_with_a_whole_head_the_mean_of_the_adapters_matrices_is_exact_and_that_of_the_head_is_not(
    orthogonal: bool,
) -> None:
    method, theta = ExactFedTT(whole_head=True, orthogonal=orthogonal), random_theta(ADAPTER, 0)
    live = live_at(method, 2)
    given_ = some_deltas(live, 1, scale=0.5)
    step = folded(method, theta, live, given_)
    found, expected = dense_matrices(ADAPTER, step.theta), mean_of_matrices(method, theta, live, given_)
    assert distance({HEAD: found.pop(HEAD)}, {HEAD: expected.pop(HEAD)}) > 0.05
    assert distance(found, expected) < 1e-5
    assert step.report == {"exact_mean": 1.0}
    of_fedtt = folded(FedTT(), theta, LAYOUT.everything, [widened(live, c) for c in given_]).theta
    for one, same in zip(*(cores_of(ADAPTER, at, HEAD) for at in (step.theta, of_fedtt)), strict=True):
        np.testing.assert_allclose(one, same, rtol=1e-6, atol=1e-6)


def widened(live: LiveSet, given_: Contribution) -> Contribution:
    """The same of all factors."""
    return Contribution(delta=live.scatter(given_.delta), examples=given_.examples)


def test_the_mean_of_all_cores_at_once_is_far_from_it() -> None:
    theta, live = random_theta(ADAPTER, 0), LAYOUT.everything
    given_ = some_deltas(live, 1, scale=0.5)
    found = dense_matrices(ADAPTER, folded(FedTT(), theta, live, given_).theta)
    assert distance(found, mean_of_matrices(FedTT(), theta, live, given_)) > 0.05


def gelu(x: NDArray[np.float64]) -> NDArray[np.float64]:
    found: NDArray[np.float64] = x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))
    return found


def adapter_function(matrices: dict[str, NDArray[np.float64]]) -> NDArray[np.float64]:
    """up(gelu(down(h))) of one adapter on some hidden states."""
    h = np.random.default_rng(7).standard_normal((20, 12))
    found: NDArray[np.float64] = gelu(h @ matrices[DOWN]) @ matrices[UP]
    return found


def error_of_functions(method: ExactFedTT, t: int, scale: float = 0.5) -> float:
    """How far the function of the folded adapter is from the mean of the devices' functions, relatively."""
    theta, live = random_theta(ADAPTER, 0), live_at(method, t)
    given_ = some_deltas(live, 1, scale=scale)
    total = sum(c.examples for c in given_)
    mean = sum(
        c.examples
        / total
        * adapter_function(dense_matrices(ADAPTER, at_device(method, theta, live, c.delta)))
        for c in given_
    )
    found = adapter_function(dense_matrices(ADAPTER, folded(method, theta, live, given_).theta))
    return float(np.linalg.norm(found - mean) / np.linalg.norm(mean))


@pytest.mark.parametrize("orthogonal", [False, True])
def test_the_function_of_an_adapter_is_exact_while_up_alone_is_live(orthogonal: bool) -> None:
    method = ExactFedTT(schedule="alternate", orthogonal=orthogonal)
    assert live_cores(method, 3)[UP]
    assert error_of_functions(method, 3) < 1e-5


@pytest.mark.parametrize(("schedule", "t"), [("cyclic", 3), ("sweep", 4), ("alternate", 2)])
def test_the_function_of_an_adapter_is_not_exact_while_down_is_live(schedule: Schedule, t: int) -> None:
    method = ExactFedTT(schedule=schedule)
    assert live_cores(method, t)[DOWN]
    assert error_of_functions(method, t) > 0.02


def test_its_error_is_of_second_order_so_small_steps_make_it_smaller_still() -> None:
    large, small = (error_of_functions(ExactFedTT(), 3, scale=scale) for scale in (0.5, 0.05))
    assert small < large / 30  # (0.5 / 0.05)² = 100


@pytest.mark.parametrize("fold", [Median(), TrimmedMean(trim=0.3), Krum()], ids=lambda f: type(f).__name__)
def test_a_fold_that_is_no_weighted_mean_loses_the_word(fold: Fold) -> None:
    theta, live = random_theta(ADAPTER, 0), live_at(ExactFedTT(), 1)
    given_ = some_deltas(live, 1, count=5)
    step = folded(ExactFedTT(), theta, live, given_, fold)
    assert step.report == {"exact_mean": 0.0}
    found = dense_matrices(ADAPTER, step.theta)
    assert distance(found, mean_of_matrices(ExactFedTT(), theta, live, given_)) > 0.05


def test_the_median_of_cores_is_not_the_median_of_matrices() -> None:
    theta, live = random_theta(ADAPTER, 0), live_at(ExactFedTT(), 2)
    given_ = some_deltas(live, 1, count=5)
    each = [dense_matrices(ADAPTER, at_device(ExactFedTT(), theta, live, c.delta)) for c in given_]
    of_matrices = {n: np.median([m[n] for m in each], axis=0) for n in each[0]}
    found = dense_matrices(ADAPTER, folded(ExactFedTT(), theta, live, given_, Median()).theta)
    assert distance(found, of_matrices) > 0.05


# server optimisers


@pytest.mark.parametrize("optimiser", ["momentum", "adam", "yogi"])
def test_moments_are_kept_by_core_and_touched_only_while_it_is_live(optimiser: Any) -> None:
    server = ServerSpec(optimiser=optimiser, learning_rate=0.1)
    method, theta = ExactFedTT(), random_theta(ADAPTER, 0)
    first, second = live_at(method, 1), live_at(method, 2)
    one = folded(method, theta, first, some_deltas(first, 1), server=server)
    two = folded(method, one.theta, second, some_deltas(second, 2), state=one.state, server=server)
    frozen = np.setdiff1d(np.arange(LAYOUT.size), second.positions)
    assert two.theta[frozen].tobytes() == one.theta[frozen].tobytes()
    assert two.state.first[frozen].tobytes() == one.state.first[frozen].tobytes()
    moved = np.setdiff1d(first.positions, second.positions)
    assert one.state.first[moved].all()
    assert two.state.first[second.positions].all()
    if optimiser != "momentum":
        assert two.state.second[frozen].tobytes() == one.state.second[frozen].tobytes()


def test_the_state_notes_the_norm_of_each_live_core_for_the_schedule() -> None:
    method, theta = ExactFedTT(schedule="norm"), random_theta(ADAPTER, 0)
    live = live_at(method, 1)
    (given_,) = some_deltas(live, 1, count=1)
    state = folded(method, theta, live, [given_]).state
    parts = np.split(given_.delta, np.cumsum(live.sizes)[:-1])
    np.testing.assert_allclose(state.norms[list(live.indices)], [np.linalg.norm(p) for p in parts], rtol=1e-6)
    assert live_cores(method, 2, state)[DOWN] == [3]  # 4 has been folded, 3 not yet


# devices


def towards(goal: dict[str, NDArray[np.float64]]) -> Gradient[float]:
    """½ Σ ‖W - goal‖² over all matrices, with its gradient by central differences: slow, and plain."""

    def loss(theta: NDArray[np.float64]) -> float:
        found = dense_matrices(ADAPTER, theta)
        return 0.5 * sum(float(((found[n] - goal[n]) ** 2).sum()) for n in goal)

    def gradient(at: Theta, _: float) -> tuple[float, Theta]:
        wide, grad = at.astype(np.float64), np.zeros(at.size)
        for i in LIVE.positions:
            there, back = wide.copy(), wide.copy()
            there[i] += 1e-5
            back[i] -= 1e-5
            grad[i] = (loss(there) - loss(back)) / 2e-5
        return loss(wide), grad.astype(np.float32)

    return gradient


LIVE = LiveSet(LAYOUT, [next(t for t in ADAPTER.tt_matrices if t.prefix == DOWN).indices[2]])


@pytest.mark.parametrize("optimiser", ["sgd", "adamw"])
def test_a_device_trains_the_matrix_in_an_orthonormal_basis_of_what_its_core_can_reach(
    optimiser: Any,
) -> None:
    theta = random_theta(ADAPTER, 3)
    goal = dense_matrices(ADAPTER, random_theta(ADAPTER, 4))
    training = TrainingSpec(optimiser=optimiser, learning_rate=0.05, proximal=0.3)
    method = ExactFedTT(orthogonal=True)
    result = drive(method.client_step(ADAPTER, theta, LIVE, [1.0] * 4, training), towards(goal))

    # the oracle: W = W_0 + B (y - y_0) with B orthonormal (d_in d_out, n), built one column at a time
    gauge, start = Gauge(ADAPTER, theta, LIVE), dense_matrices(ADAPTER, theta)[DOWN]
    columns = []
    for unit in np.eye(LIVE.size):
        moved = theta + LIVE.scatter(gauge.leave(unit))
        columns.append((dense_matrices(ADAPTER, moved)[DOWN] - start).reshape(-1))
    B = np.stack(columns, axis=1)
    np.testing.assert_allclose(B.T @ B, np.eye(LIVE.size), atol=1e-9)
    y_0 = gauge.enter(LIVE.gather(theta)).astype(np.float32)
    y, steps = y_0.copy(), Optimiser(training, LIVE.size)
    for _ in range(4):
        W = start.reshape(-1) + B @ (y - y_0).astype(np.float64)
        pull = (B.T @ (W - goal[DOWN].reshape(-1))).astype(np.float32)
        steps.step_(y, pull + np.float32(0.3) * (y - y_0))
    np.testing.assert_allclose(result.delta, y - y_0, rtol=1e-3, atol=1e-4)


@given(method=methods, t=st.integers(1, 10))
@settings(deadline=None, max_examples=10)
def test_the_fold_of_one_device_is_where_that_device_ended(method: ExactFedTT, t: int) -> None:
    theta, seen = random_theta(ADAPTER, 5), list[Theta]()
    live = live_at(method, t)

    def gradient(at: Theta, _: float) -> tuple[float, Theta]:
        seen.append(at.copy())
        return 0.0, at - 1

    training = TrainingSpec(learning_rate=0.02)
    result = drive(method.client_step(ADAPTER, theta, live, [1.0] * 3, training), gradient)
    again = drive(method.client_step(ADAPTER, theta, live, [1.0] * 4, training), gradient)
    assert again.steps == 4
    ended = seen[-1]  # after three steps, as the fourth gradient was asked for
    found = folded(method, theta, live, [Contribution(delta=result.delta, examples=1)]).theta
    np.testing.assert_allclose(found, ended, rtol=1e-4, atol=1e-4)
    frozen = np.setdiff1d(np.arange(LAYOUT.size), live.positions)
    assert all(at[frozen].tobytes() == theta[frozen].tobytes() for at in seen)


def test_a_live_set_of_another_method_is_refused_where_coordinates_would_change() -> None:
    method = ExactFedTT(orthogonal=True)
    with pytest.raises(LayoutError, match="3 live cores"):
        method.client_step(
            ADAPTER, random_theta(ADAPTER, 0), FedTTPlus().live(ADAPTER, 1), [1.0], TrainingSpec()
        )


# settings


def test_lora_and_bundles_without_trains_are_refused() -> None:
    ExactFedTT().check(ADAPTER)
    ExactFedTT().check(small_adapter("none", hidden=16, layers=1, head="label-names"))
    ExactFedTT().check(small_adapter("dense", hidden=16, layers=1, head="tt"))
    refused: list[AdapterSpec] = [
        small_adapter("lora", hidden=16, layers=1, head="tt"),
        small_adapter("dense", hidden=16, layers=1, head="dense"),
    ]
    for adapter in refused:
        with pytest.raises(ConfigError, match=r"method\.name = 'exact-fedtt'"):
            ExactFedTT().check(adapter)


@pytest.mark.parametrize("method", [ExactFedTT(whole_head=True), FedTTPlus(whole_head=True)])
def test_a_whole_head_is_refused_where_head_or_adapters_are_no_trains(method: Method) -> None:
    method.check(ADAPTER)
    no_trains = [
        long_adapter(head=None),
        small_adapter("tt", hidden=16, layers=1, head="dense"),
        small_adapter("none", hidden=16, layers=1, head="label-names"),
        small_adapter("dense", hidden=16, layers=1, head="tt"),
    ]
    for adapter in no_trains:
        with pytest.raises(ConfigError, match=r"method\.whole_head = True .* adapters and head are"):
            method.check(adapter)


def test_epochs_by_norm_last_one_round() -> None:
    with pytest.raises(ConfigError, match=r"method\.epoch_rounds = 2 .* schedule 'norm'"):
        ExactFedTT(schedule="norm", epoch_rounds=2)


def test_error_feedback_is_refused_where_coordinates_change_and_taken_where_they_do_not() -> None:
    rounds, codec = RoundSpec(count=1, cohort=1), CodecSpec(error_feedback=True)
    TaskSpec(name="t", rounds=rounds, codec=codec, method=ExactFedTT())
    with pytest.raises(ConfigError, match=r"codec\.error_feedback = True .* residual"):
        TaskSpec(name="t", rounds=rounds, codec=codec, method=ExactFedTT(orthogonal=True))


def test_a_fifth_of_the_numbers_is_sent() -> None:
    minilm = plan_adapter(
        plan_tt(hidden=384), hidden=384, layers=6, head=plan_head("label-names", hidden=384, labels=150)
    )
    assert minilm.layout.size == 17_724
    sent = [ExactFedTT().live(minilm, t, norms()).size for t in range(1, 6)]
    assert (min(sent), max(sent)) == (1_174, 5_950)
    assert np.mean(sent) < 17_724 / 4.5
