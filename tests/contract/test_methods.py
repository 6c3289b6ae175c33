"""What every method promises, whatever it trains: live sets, local training and folds."""

from __future__ import annotations

import contextlib
from typing import get_args

import msgspec
import numpy as np
import pytest
from msgspec import Struct

from fedtt.adapter import AdapterSpec, initial_theta
from fedtt.algorithms import (
    DenseAdapter,
    ExactFedTT,
    FedAvg,
    FedLoRA,
    FedSB,
    FedTT,
    FedTTPlus,
    FFALoRA,
    FlexLoRA,
    HierFedLoRA,
    HierFedTT,
    LinearProbe,
    Method,
    RoLoRA,
    Tier,
    TTSVDFedTT,
    drive,
)
from fedtt.errors import ConfigError
from fedtt.folds import Contribution
from fedtt.layout import LiveSet, Theta
from fedtt.optimiser import TrainingSpec
from fedtt.server_optimiser import ServerState
from fedtt.server_step import Step, server_step
from fedtt.task import RoundSpec, TaskSpec
from tests.support.adapters import small_adapter
from tests.support.trains import long_adapter

TT, LORA = long_adapter(), small_adapter("lora", hidden=16, layers=2, head="label-names")
SB = small_adapter("lora-sb", hidden=16, layers=2, head="label-names")
DENSE, HEAD = (
    small_adapter("dense", hidden=16, layers=2, head="tt"),
    small_adapter("none", hidden=16, layers=2, head="dense"),
)
CASES: dict[str, tuple[Method, AdapterSpec]] = {
    "fedtt": (FedTT(), TT),
    "fedtt, cores alone": (FedTT(cores_only=True), TT),
    "fedtt-plus": (FedTTPlus(), TT),
    "fedtt-plus, fixed": (FedTTPlus(rotation="fixed"), TT),
    "fedtt-plus, whole head": (FedTTPlus(whole_head=True), TT),
    "exact-fedtt": (ExactFedTT(), TT),
    "exact-fedtt, sweep": (ExactFedTT(schedule="sweep", epoch_rounds=2), TT),
    "exact-fedtt, norm": (ExactFedTT(schedule="norm"), TT),
    "exact-fedtt, alternate": (ExactFedTT(schedule="alternate"), TT),
    "exact-fedtt, orthogonal": (ExactFedTT(orthogonal=True), TT),
    "exact-fedtt, whole head, orthogonal": (ExactFedTT(whole_head=True, orthogonal=True), TT),
    "tt-svd-fedtt": (TTSVDFedTT(), TT),
    "tt-svd-fedtt, two ranks": (TTSVDFedTT(tiers=(Tier(rank=1, below_mb=100),)), TT),
    "fedlora": (FedLoRA(), LORA),
    "ffa-lora": (FFALoRA(), LORA),
    "rolora": (RoLoRA(), LORA),
    "fed-sb": (FedSB(), SB),
    "fed-sb, in turns": (FedSB(turns=2), SB),
    "flexlora": (FlexLoRA(), LORA),
    "flexlora, two ranks": (FlexLoRA(tiers=(Tier(rank=1, below_mb=100),)), LORA),
    "hier-fedlora": (HierFedLoRA(warmup_rounds=1), LORA),
    "hier-fedtt": (HierFedTT(warmup_rounds=1), TT),
    "dense-adapter": (DenseAdapter(), DENSE),
    "head-only": (LinearProbe(), HEAD),
    "fedavg": (FedAvg(), LORA),
}
every = pytest.mark.parametrize("case", CASES)


def tag(method: Struct) -> str:
    return str(method.__struct_config__.tag)


def trained(adapter: AdapterSpec) -> Theta:
    """Factors of a model that has been trained: nothing is zero, no interface deficient."""
    noise = np.random.default_rng(3).normal(0, 0.3, adapter.layout.size)
    return (initial_theta(adapter, 0) + noise).astype(np.float32)


def folded_once(adapter: AdapterSpec) -> ServerState:
    """What folds left that moved every factor."""
    empty = np.zeros(0, np.float32)
    return ServerState(first=empty, second=empty, norms=np.ones(len(adapter.layout.factors), np.float32))


def step(
    method: Method, adapter: AdapterSpec, theta: Theta, live: LiveSet, given: list[Contribution]
) -> Step:
    spec = TaskSpec(name="t", rounds=RoundSpec(count=2, cohort=9), method=method)
    bases: dict[int | None, Theta] = {None: theta}
    bases |= {rank: method.variant(adapter, theta, rank) for rank in method.ranks}
    return server_step(spec, adapter, bases, live, given, None)


def some(live: LiveSet, scale: float = 0.1) -> list[Contribution]:
    rng = np.random.default_rng(4)
    return [
        Contribution(delta=(scale * rng.standard_normal(live.size)).astype(np.float32), examples=n)
        for n in (3, 5, 8)
    ]


def test_every_method_stands_here() -> None:
    assert {tag(method) for method, _ in CASES.values()} == {
        str(kind.__struct_config__.tag) for kind in get_args(Method)
    }


@every
def test_it_trains_its_adapter_and_refuses_or_trains_any_other_without_a_bug(case: str) -> None:
    method, adapter = CASES[case]
    method.check(adapter)
    for other in (TT, LORA, SB, DENSE, HEAD):
        with contextlib.suppress(ConfigError):
            method.check(other)
            assert method.live(other, 1).size


@every
def test_it_comes_back_from_a_plan_as_it_went(case: str) -> None:
    method, _ = CASES[case]
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(method), type=Method) == method


@every
def test_what_is_live_in_a_round_follows_from_the_round_and_the_state_alone(case: str) -> None:
    method, adapter = CASES[case]
    for t in range(1, 13):
        for state in (None, folded_once(adapter)):
            live = method.live(adapter, t, state)
            assert live.layout.digest == adapter.layout.digest
            assert live.indices == method.live(adapter, t, state).indices
        assert method.same_gauge(t, t)


@every
def test_a_device_moves_the_live_factors_alone_and_leaves_the_version_as_it_is(case: str) -> None:
    method, adapter = CASES[case]
    theta, seen = trained(adapter), list[Theta]()
    live = method.live(adapter, 2, folded_once(adapter))

    def gradient(at: Theta, _: int) -> tuple[float, Theta]:
        seen.append(at.copy())
        return 1.0, np.ones_like(at)

    steps = method.client_step(adapter, theta, live, range(3), TrainingSpec())
    result = drive(steps, gradient)
    assert theta.tobytes() == trained(adapter).tobytes()
    assert result.delta.shape == (live.size,)
    assert result.delta.dtype == np.float32
    assert np.isfinite(result.delta).all()
    assert result.delta.any()
    assert result.steps == len(seen) == 3
    frozen = np.setdiff1d(np.arange(theta.size), live.positions)
    for at in seen:
        assert at[frozen].tobytes() == theta[frozen].tobytes()
    np.testing.assert_allclose(seen[0], theta, rtol=1e-4, atol=1e-5)


@every
def test_the_same_ledger_gives_the_same_bits_and_arguments_are_left_alone(case: str) -> None:
    method, adapter = CASES[case]
    theta, live = trained(adapter), method.live(adapter, 2, folded_once(adapter))
    given = some(live)
    once = step(method, adapter, theta, live, given)
    assert once.theta.tobytes() == step(method, adapter, theta, live, given).theta.tobytes()
    assert once.theta.dtype == np.float32
    assert once.theta.tobytes() != theta.tobytes()
    assert theta.tobytes() == trained(adapter).tobytes()
    for before, after in zip(some(live), given, strict=True):
        assert before.delta.tobytes() == after.delta.tobytes()
    assert set(once.variants) == set(method.ranks)
    assert all(np.isfinite(value) for value in once.report.values())


@every
@pytest.mark.parametrize("count", [0, 3])
def test_devices_that_train_nothing_leave_the_model_as_it_is(case: str, count: int) -> None:
    method, adapter = CASES[case]
    theta, live = trained(adapter), method.live(adapter, 2, folded_once(adapter))
    assert (
        step(method, adapter, theta, live, some(live, scale=0.0)[:count]).theta.tobytes() == theta.tobytes()
    )
