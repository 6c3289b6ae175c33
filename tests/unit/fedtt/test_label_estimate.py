"""Labels estimated from a bias's change: against the formula written out, and against real local training."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from fedtt.label_estimate import estimated_label_counts, estimated_shares
from fedtt.optimiser import Optimiser, TrainingSpec

quick = settings(deadline=None, max_examples=80)


def slow_shares(moves: list[float]) -> list[float]:
    """max(0, r + 3/4) over their sum, of how far each number of the bias moved of the way it might have."""
    parts = [max(0.0, min(1.0, max(-1.0, r)) + 0.75) for r in moves]
    return [part / sum(parts) if sum(parts) else 1 / len(parts) for part in parts]


@quick
@given(st.lists(st.floats(-1.5, 1.5), min_size=2, max_size=6), st.integers(1, 50))
def test_adams_moves_give_the_shares_of_the_formula(moves: list[float], steps: int) -> None:
    found = estimated_shares(np.array(moves) * 0.01 * steps, TrainingSpec(learning_rate=0.01), steps)
    np.testing.assert_allclose(found, slow_shares(moves), atol=1e-9)


@quick
@given(
    st.lists(st.integers(0, 20), min_size=2, max_size=6).filter(any),
    st.floats(0.0, 0.95),
    st.integers(1, 30),
)
def test_sgd_of_a_constant_gradient_gives_the_shares_of_the_formula(
    counts: list[int], momentum: float, steps: int
) -> None:
    shares = np.array(counts) / sum(counts)
    training = TrainingSpec(optimiser="sgd", learning_rate=0.1, momentum=momentum)
    optimiser, bias = Optimiser(training, len(counts)), np.zeros(len(counts), np.float32)
    for _ in range(steps):
        optimiser.step_(bias, (1 / len(counts) - shares).astype(np.float32))
    parts = [max(0.0, share - 1 / len(counts) + 1 / (4 * len(counts))) for share in shares]
    found = estimated_shares(bias, training, steps)
    np.testing.assert_allclose(found, np.array(parts) / sum(parts), atol=1e-4)


@pytest.mark.parametrize(("optimiser", "rate", "share"), [("adamw", 5e-3, 0.4), ("sgd", 1e-2, 0.4)])
def test_real_training_of_a_bias_tells_the_labels(optimiser: str, rate: float, share: float) -> None:
    """Softmax regression on a bias alone; in total variation distance far nearer than equal shares are."""
    rng, near, far = np.random.default_rng(0), [], []
    for _ in range(20):
        labels = rng.choice(30, size=64, p=rng.dirichlet([0.1] * 30))
        training = TrainingSpec(optimiser=optimiser, learning_rate=rate, local_steps=8)  # type: ignore[arg-type]
        true = np.bincount(labels, minlength=30) / 64
        found = estimated_shares(trained_bias(labels, 30, training, rng), training, 8)
        near.append(np.abs(found - true).sum() / 2)
        far.append(np.abs(1 / 30 - true).sum() / 2)
    assert np.mean(near) < share * np.mean(far)


def trained_bias(
    labels: NDArray[np.int64], classes: int, training: TrainingSpec, rng: np.random.Generator
) -> NDArray[np.float32]:
    """What a bias that starts at zero comes to; each batch's gradient is its softmax less its labels."""
    bias, optimiser = np.zeros(classes, np.float32), Optimiser(training, classes)
    order = np.concatenate([rng.permutation(labels) for _ in range(training.local_steps)])
    for step in range(training.local_steps):
        batch = order[step * training.batch_size :][: training.batch_size]
        softmax = np.exp(bias) / np.exp(bias).sum()
        gradient = softmax - np.bincount(batch, minlength=classes) / training.batch_size
        optimiser.step_(bias, gradient.astype(np.float32))
    return bias


@pytest.mark.parametrize("optimiser", ["adamw", "sgd"])
@pytest.mark.parametrize("shift", [[0.0, 0.0, 0.0], [-1e30, -1e30, -1e30], [3e38, 0.0, -3e38]])
def test_any_finite_shift_and_number_of_steps_gives_shares(optimiser: str, shift: list[float]) -> None:
    training = TrainingSpec(optimiser=optimiser)  # type: ignore[arg-type]
    for steps in (1, 2**32):
        found = estimated_shares(np.array(shift, np.float32), training, steps)
        assert (found >= 0).all()
        assert found.sum() == pytest.approx(1.0)
        assert estimated_label_counts(found, 2**32).sum() == 2**32


@quick
@given(st.lists(st.integers(0, 50), min_size=1, max_size=8).filter(any), st.integers(0, 1000))
def test_counts_are_whole_add_up_and_lie_within_one_of_the_exact(shares: list[int], examples: int) -> None:
    exact = np.array(shares) / sum(shares)
    counts = estimated_label_counts(exact, examples)
    assert counts.sum() == examples
    assert (np.abs(counts - exact * examples) < 1 + 1e-9).all()
