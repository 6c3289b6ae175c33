"""What a private task comes to, against simulation and integration."""

from __future__ import annotations

import math

import numpy as np
import pytest

from edge_client.batches import batch_rows
from fedtt.errors import ConfigError
from fedtt.privacy import PrivacySpec, epsilon_of, participations
from fedtt.task import parse_task

SPEC = PrivacySpec(clip=1.0, noise_multiplier=1.5)
TASK = 'name = "t"\n[rounds]\ncount = 3\ncohort = 4\n[privacy]\nclip = 1.0\nnoise_multiplier = 1.0\n'


@pytest.mark.parametrize("examples", [1, 3, 16, 17, 40])
@pytest.mark.parametrize("steps", [1, 2, 7, 30])
def test_no_example_is_in_more_batches_than_counted_and_one_is_in_as_many(examples: int, steps: int) -> None:
    rng = np.random.default_rng(0)
    counts = np.bincount(np.concatenate(list(batch_rows(examples, 8, steps, rng))), minlength=examples)
    assert counts.max() == participations(examples, 8, steps)


@pytest.mark.parametrize("mu", [0.1, 0.5, 1.0, 3.0])
@pytest.mark.parametrize("delta", [1e-3, 1e-5])
def test_epsilon_is_where_the_privacy_loss_of_two_normals_leaves_delta(mu: float, delta: float) -> None:
    """δ(ε) = ∫ max(0, p(x) - e^ε q(x)) dx, p and q normals whose means are μ apart."""
    epsilon = epsilon_of(mu * mu, delta)
    x = np.linspace(-40, 40, 2_000_001)
    p, q = (np.exp(-((x - m) ** 2) / 2) / math.sqrt(2 * math.pi) for m in (mu, 0.0))
    integral = float(np.trapezoid(np.maximum(0.0, p - np.exp(epsilon) * q), x))
    assert integral == pytest.approx(delta, rel=1e-4)


def test_a_known_value_of_the_gaussian_mechanism() -> None:
    # Balle & Wang 2018 (arXiv 1805.06530): σ for (1, 1e-5) at sensitivity 1 is 3.730632
    assert epsilon_of(1 / 3.730632**2, 1e-5) == pytest.approx(1.0, rel=1e-4)


def test_trainings_add_up_and_nothing_is_spent_by_none() -> None:
    assert epsilon_of(0.0, 1e-5) == 0.0
    once = SPEC.spent(examples=20, batch_size=8, steps=9)
    assert once == pytest.approx(3 / 1.5**2)  # ⌈9 / ⌈20 / 8⌉⌉ = 3 batches
    assert epsilon_of(2 * once, 1e-5) > epsilon_of(once, 1e-5)
    assert math.isfinite(epsilon_of(1e4, 1e-5))


@pytest.mark.parametrize(
    ("more", "complaint"),
    [
        ('[sampling]\nstrategy = "oort"', "sampling.strategy = 'oort' is not allowed: 'uniform' or"),
        ("[evaluation]", "evaluation.by = 'devices' is not allowed: 'file' with"),
        ('[method]\nname = "hier-fedtt"', "method.name = 'hier-fedtt' is not allowed: none that goes by"),
    ],
)
def test_a_private_task_goes_by_nothing_that_tells_of_single_examples(more: str, complaint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_task(TASK + more)
    assert complaint in str(caught.value)
