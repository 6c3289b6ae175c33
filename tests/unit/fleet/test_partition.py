"""Dealing rows out to devices."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from fedtt.errors import ConfigError
from fedtt.rng import Purpose, rng_for
from fleet.partition import Shards, by_user, dirichlet, few_labels, iid, lognormal, zipf

LABELS = [i % 5 for i in range(500)]
USERS = [f"user {i % 20}" for i in range(500)]

Deal = Callable[[int, int], Shards]  #: (devices, seed)

DEALS: dict[str, Deal] = {
    "iid": lambda devices, seed: iid(500, devices, seed),
    "mild dirichlet": lambda devices, seed: dirichlet(LABELS, devices, 100.0, seed),
    "severe dirichlet": lambda devices, seed: dirichlet(LABELS, devices, 0.1, seed),
    "two labels": lambda devices, seed: few_labels(LABELS, devices, 2, seed),
    "lognormal": lambda devices, seed: lognormal(500, devices, 1.5, seed),
    "zipf": lambda devices, seed: zipf(500, devices, 1.2, seed),
}


@pytest.mark.parametrize("deal", DEALS.values(), ids=DEALS)
@given(devices=st.integers(3, 20), seed=st.integers(0, 50))
def test_every_row_goes_to_exactly_one_device_and_no_device_goes_empty(
    deal: Deal, devices: int, seed: int
) -> None:
    shards = deal(devices, seed)
    assert len(shards) == devices
    assert min(map(len, shards)) >= 1
    assert sorted(row for shard in shards for row in shard) == list(range(500))


@pytest.mark.parametrize("deal", DEALS.values(), ids=DEALS)
def test_the_same_seed_deals_the_same_shards_and_another_seed_others(deal: Deal) -> None:
    assert deal(7, 3) == deal(7, 3)
    assert deal(7, 3) != deal(7, 4)


def test_iid_shards_differ_by_one_row_at_most() -> None:
    sizes = set(map(len, iid(500, 7, 0)))
    assert sizes == {71, 72}  # 4·71 + 3·72 = 500


@given(devices=st.integers(2, 30), labels_each=st.integers(1, 5), seed=st.integers(0, 20))
def test_a_device_of_few_labels_holds_exactly_as_many_and_labels_are_spread_evenly(
    devices: int, labels_each: int, seed: int
) -> None:
    assume(devices * labels_each >= 5)
    held = [{LABELS[row] for row in shard} for shard in few_labels(LABELS, devices, labels_each, seed)]
    assert {len(labels) for labels in held} == {labels_each}
    holders = [sum(label in labels for labels in held) for label in range(5)]
    assert max(holders) - min(holders) <= 1


def test_quantity_skew_grows_with_its_parameter_and_zipf_follows_its_law() -> None:
    def ratio(shards: Shards) -> float:
        sizes = sorted(map(len, shards))
        return sizes[-1] / sizes[0]

    assert ratio(lognormal(5000, 10, 0.0, 1)) == 1
    assert ratio(lognormal(5000, 10, 0.5, 1)) < ratio(lognormal(5000, 10, 1.5, 1))
    sizes = sorted((len(shard) for shard in zipf(100_000, 4, 1.0, 0)), reverse=True)
    np.testing.assert_allclose(sizes, 100_000 / (25 / 12) / np.arange(1, 5), rtol=1e-3)  # H_4 = 25/12


def test_natural_users_keep_their_rows_together() -> None:
    shards = by_user(USERS, 8, seed=1)
    owners = [{USERS[row] for row in shard} for shard in shards]
    assert {len(owner) for owner in owners} == {1}
    assert len(set.union(*owners)) == 8
    assert {len(shard) for shard in shards} == {25}  # 500 rows of 20 users
    assert by_user(USERS, 8, seed=1) == shards
    assert by_user(USERS, 8, seed=2) != shards


def test_a_small_alpha_skews_labels_and_a_large_one_does_not() -> None:
    def largest_share(alpha: float) -> float:
        shards = dirichlet(LABELS, 10, alpha, 0)
        counts = [np.bincount([LABELS[row] for row in shard], minlength=5) for shard in shards]
        return float(np.mean([count.max() / count.sum() for count in counts]))

    assert largest_share(0.1) > 0.5
    assert largest_share(1000.0) < 0.25  # five labels in equal parts would be 0.2


def dirichlet_by_lists(labels: list[int], devices: int, alpha: float, seed: int, least: int) -> Shards:
    """The obvious way: deal all rows, then count."""
    rng = rng_for(seed, Purpose.PARTITION)
    array = np.asarray(labels)
    while True:
        shards: Shards = [[] for _ in range(devices)]
        for label in np.unique(array):
            rows = rng.permutation(np.flatnonzero(array == label))
            ends = (np.cumsum(rng.dirichlet(np.full(devices, alpha)))[:-1] * len(rows)).astype(int)
            for shard, part in zip(shards, np.split(rows, ends), strict=True):
                shard.extend(part.tolist())
        if min(map(len, shards)) >= least:
            return shards


@settings(max_examples=40, deadline=None)
@given(
    labels=st.lists(st.integers(0, 6), min_size=60, max_size=200),
    devices=st.integers(1, 9),
    alpha=st.sampled_from([0.3, 1.0, 50.0]),
    seed=st.integers(0, 9),
    least=st.integers(0, 3),
)
def test_what_is_drawn_is_what_dealing_and_counting_comes_to(
    labels: list[int], devices: int, alpha: float, seed: int, least: int
) -> None:
    dealt = dirichlet(labels, devices, alpha, seed, least)
    assert dealt == dirichlet_by_lists(labels, devices, alpha, seed, least)


def test_what_cannot_be_had_of_many_devices_and_labels_is_refused_in_seconds() -> None:
    labels = [row % 150 for row in range(15_000)]
    began_s = time.process_time()
    with pytest.raises(ConfigError, match=r"alpha = 0\.1 .*none of 222 draws"):  # 1e8 / (150 · 3,000)
        dirichlet(labels, 3000, 0.1, 0)
    assert time.process_time() - began_s < 10


def test_every_device_gets_the_least_that_was_asked_for() -> None:
    assert min(map(len, dirichlet(LABELS, 10, 0.3, 0, least=10))) >= 10


REFUSED: dict[str, tuple[str, Callable[[], Shards]]] = {
    "more devices than rows": ("devices", lambda: iid(500, 501, 0)),
    "no device": ("devices", lambda: iid(500, 0, 0)),
    "more asked for than there is": ("devices", lambda: dirichlet(LABELS, 100, 1.0, 0, 6)),
    "no alpha": ("alpha", lambda: dirichlet(LABELS, 5, 0.0, 0)),
    "an alpha too small": ("alpha", lambda: dirichlet(LABELS, 50, 1e-3, 0, 9)),
    "an alpha that is no number": ("alpha", lambda: dirichlet(LABELS, 5, float("nan"), 0)),
    "no label": ("labels_each", lambda: few_labels(LABELS, 5, 0, 0)),
    "more labels than there are": ("labels_each", lambda: few_labels(LABELS, 5, 6, 0)),
    "labels nobody holds": ("labels_each", lambda: few_labels(LABELS, 3, 1, 0)),
    "more holders than rows of a label": ("labels_each", lambda: few_labels([0, 1, 1, 1, 1], 4, 2, 0)),
    "a negative sigma": ("sigma", lambda: lognormal(500, 5, -1.0, 0)),
    "an exponent too large": ("exponent", lambda: zipf(500, 5, 1e9, 0)),
    "more devices than users": ("devices", lambda: by_user(USERS, 21, 0)),
    "users with too few rows": ("devices", lambda: by_user(USERS, 5, 0, 26)),
}


@pytest.mark.parametrize(("field", "deal"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_dealt_is_refused_by_name(field: str, deal: Callable[[], Shards]) -> None:
    with pytest.raises(ConfigError) as caught:
        deal()
    assert caught.value.field == field


def test_an_alpha_that_is_too_large_is_told_so_and_the_largest_deals() -> None:
    with pytest.raises(ConfigError, match=r"alpha = 1e\+308 .*at most 1e\+09"):
        dirichlet(LABELS, 5, 1e308, 0)
    assert sum(map(len, dirichlet(LABELS, 5, 1e9, 0))) == len(LABELS)
