from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from fedtt.adapter import AdapterSpec, initial_theta
from fedtt.algorithms import FedAvg, FedSB
from fedtt.folds import Contribution
from fedtt.kinds import LoraSB
from fedtt.layout import Theta
from fedtt.server_step import server_step
from fedtt.task import RoundSpec, TaskSpec
from tests.support.adapters import small_adapter
from tests.support.trains import random_theta

ADAPTER = small_adapter("lora-sb", hidden=16, layers=3, depth=2, rank=3, head="dense", narrow=8)
THETA = random_theta(ADAPTER, 0)


def products(adapter: AdapterSpec, theta: Theta) -> list[NDArray[np.float64]]:
    """(α / r) B R A of every update, (d_out, d_in), multiplied out."""
    inserted, parts = adapter.inserted, list(adapter.layout.unflatten(theta).values())
    assert isinstance(inserted, LoraSB)
    return [inserted.scale * parts[i + 1] @ parts[i] @ parts[i - 1] for i in adapter.square_cores]


def test_the_square_matrices_and_the_head_are_live() -> None:
    names = [ADAPTER.layout.factors[i].name for i in FedSB().live(ADAPTER, 3).indices]
    squares = [f"block.{b}.{target}.lora_r" for b in (1, 2) for target in ("query", "value")]
    assert names == [*squares, "head.weight", "head.bias"]
    assert FedSB().live(ADAPTER, 3).size == 4 * 3**2 + 4 * 16 + 4  # r² whatever the widths, and the head


def test_it_starts_as_the_identity_between_frames_of_norm_one() -> None:
    theta = initial_theta(small_adapter("lora-sb", hidden=384, layers=1, rank=8, head="dense"), 0)
    adapter = small_adapter("lora-sb", hidden=384, layers=1, rank=8, head="dense")
    assert not any(product.any() for product in products(adapter, theta))
    named = adapter.layout.unflatten(theta)
    np.testing.assert_allclose(np.linalg.norm(named["block.0.query.lora_a"], axis=1), 1, atol=0.2)
    np.testing.assert_allclose(np.linalg.norm(named["block.0.query.lora_b"], axis=0), 1, atol=0.2)


@pytest.mark.parametrize(("method", "exact"), [(FedSB(), True), (FedAvg(), False)], ids=["fed-sb", "all"])
def test_the_mean_of_the_square_matrices_is_that_of_the_products(method: FedAvg, exact: bool) -> None:
    live, rng = method.live(ADAPTER, 1), np.random.default_rng(1)
    given_ = [
        Contribution(delta=rng.standard_normal(live.size).astype(np.float32), examples=n) for n in (3, 5, 1)
    ]
    spec = TaskSpec(name="t", rounds=RoundSpec(count=1, cohort=1), method=method)
    found = products(ADAPTER, server_step(spec, ADAPTER, {None: THETA}, live, given_, None).theta)
    sent = [products(ADAPTER, THETA + live.scatter(c.delta)) for c in given_]
    for number, product in enumerate(found):
        mean = sum(c.examples / 9 * one[number] for c, one in zip(given_, sent, strict=True))
        apart = float(np.linalg.norm(product - mean)) / float(np.linalg.norm(mean))
        assert (apart < 1e-6) if exact else (apart > 0.05)
