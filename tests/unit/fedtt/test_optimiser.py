"""Our flat-vector optimisers against torch.optim, which shares no code with them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from fedtt.optimiser import Optimiser, TrainingSpec

_STEPS, _SIZE = 20, 50


def ours(spec: TrainingSpec, start: Any, grads: Any) -> Any:
    theta, optimiser = start.copy(), Optimiser(spec, _SIZE)
    for grad in grads:
        optimiser.step_(theta, grad)
    return theta


def theirs(optimiser: type[torch.optim.Optimizer], start: Any, grads: Any, **settings: Any) -> Any:
    theta = torch.nn.Parameter(torch.from_numpy(start.copy()))
    stepper = optimiser([theta], **settings)
    for grad in grads:
        theta.grad = torch.from_numpy(grad)
        stepper.step()
    return theta.detach().numpy()


def apart(start: Any, one: Any, other: Any) -> float:
    """How far two ends lie apart, by norm, relative to the way from the start."""
    return float(np.linalg.norm(one - other) / np.linalg.norm(other - start))


@pytest.fixture
def problem() -> tuple[Any, Any]:
    """Start and gradients whose sizes span six decades, as those of TT cores do."""
    rng = np.random.default_rng(3)
    scale = 10.0 ** rng.uniform(-5, 1, _SIZE)
    grads = (rng.standard_normal((_STEPS, _SIZE)) * scale).astype(np.float32)
    return (0.1 * rng.standard_normal(_SIZE)).astype(np.float32), grads


@pytest.mark.parametrize(
    "spec",
    [
        TrainingSpec(learning_rate=1e-2),
        TrainingSpec(learning_rate=1e-2, weight_decay=0.1),
        TrainingSpec(learning_rate=5e-3, momentum=0.5, second_moment=0.9),
        TrainingSpec(learning_rate=5e-3, momentum=0.0),
    ],
)
def test_adamw_is_that_of_torch(spec: TrainingSpec, problem: tuple[Any, Any]) -> None:
    betas = (spec.momentum, spec.second_moment)
    expected = theirs(
        torch.optim.AdamW, *problem, lr=spec.learning_rate, betas=betas, weight_decay=spec.weight_decay
    )
    assert apart(problem[0], ours(spec, *problem), expected) < 1e-6


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_sgd_is_that_of_torch(momentum: float, problem: tuple[Any, Any]) -> None:
    spec = TrainingSpec(optimiser="sgd", learning_rate=1e-2, momentum=momentum)
    expected = theirs(torch.optim.SGD, *problem, lr=1e-2, momentum=momentum)
    assert apart(problem[0], ours(spec, *problem), expected) < 1e-6


def test_weight_decay_of_sgd_is_decoupled_from_the_gradient() -> None:
    spec = TrainingSpec(optimiser="sgd", learning_rate=0.1, momentum=0.0, weight_decay=0.5)
    theta = np.array([2.0], np.float32)
    Optimiser(spec, 1).step_(theta, np.array([3.0], np.float32))
    assert theta.tolist() == pytest.approx([1.6])  # 2·(1 - 0.1·0.5) - 0.1·3


@pytest.mark.parametrize("optimiser", ["adamw", "sgd"])
def test_a_step_works_in_place_and_leaves_the_gradient_alone(optimiser: Any) -> None:
    theta, grad = np.ones(3, np.float32), np.array([1, 0, -1], np.float32)
    view = theta[:]
    Optimiser(TrainingSpec(optimiser=optimiser), 3).step_(theta, grad)
    assert view[0] < 1
    assert view[1] == 1
    assert view[2] > 1
    assert theta.dtype == np.float32
    assert grad.tolist() == [1, 0, -1]
