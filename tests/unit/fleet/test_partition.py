"""Dealing rows out to devices."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedtt.errors import ConfigError
from fleet.partition import dirichlet

LABELS = [i % 5 for i in range(500)]


@given(st.integers(0, 50), st.floats(0.1, 100.0), st.integers(1, 20))
def test_every_row_goes_to_exactly_one_device(seed: int, alpha: float, devices: int) -> None:
    shards = dirichlet(LABELS, devices, alpha, seed)
    assert sorted(row for shard in shards for row in shard) == list(range(500))


def test_the_same_seed_deals_the_same_shards_and_another_seed_others() -> None:
    assert dirichlet(LABELS, 7, 0.5, 3) == dirichlet(LABELS, 7, 0.5, 3)
    assert dirichlet(LABELS, 7, 0.5, 3) != dirichlet(LABELS, 7, 0.5, 4)


def test_a_small_alpha_skews_labels_and_a_large_one_does_not() -> None:
    def largest_share(alpha: float) -> float:
        shards = dirichlet(LABELS, 10, alpha, 0)
        counts = [np.bincount([LABELS[row] for row in shard], minlength=5) for shard in shards]
        return float(np.mean([count.max() / count.sum() for count in counts]))

    assert largest_share(0.1) > 0.5
    assert largest_share(1000.0) < 0.25  # five labels in equal parts would be 0.2


def test_every_device_gets_the_least_that_was_asked_for() -> None:
    assert min(map(len, dirichlet(LABELS, 10, 0.3, 0, least=10))) >= 10


@pytest.mark.parametrize(
    ("devices", "alpha", "least", "field"),
    [(501, 1.0, 1, "devices"), (100, 1.0, 6, "devices"), (5, 0.0, 1, "alpha"), (50, 1e-3, 9, "alpha")],
)
def test_what_cannot_be_dealt_is_refused_by_name(devices: int, alpha: float, least: int, field: str) -> None:
    with pytest.raises(ConfigError) as caught:
        dirichlet(LABELS, devices, alpha, 0, least)
    assert caught.value.field == field
