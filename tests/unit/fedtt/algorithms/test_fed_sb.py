from __future__ import annotations

from itertools import combinations, pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from fedtt.adapter import AdapterSpec, initial_theta
from fedtt.algorithms import FedSB
from fedtt.algorithms.fed_sb import _even_parts
from fedtt.errors import ConfigError
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
    """(α / r) B R A of every update, (d_out, d_in), multiplied out between frames that stay."""
    inserted, rng = adapter.inserted, np.random.default_rng(2)
    assert isinstance(inserted, LoraSB)
    found = []
    for name, core in adapter.layout.unflatten(theta).items():
        if name.endswith(".lora_r"):
            target = next(t for t in inserted.targets if name.endswith(f".{t.name}.lora_r"))
            a, b = (
                rng.normal(size=(inserted.rank, target.d_in)),
                rng.normal(size=(target.d_out, inserted.rank)),
            )
            found.append(inserted.scale * b @ core @ a)
    return found


def test_the_square_matrices_and_the_head_are_all_that_is_trained() -> None:
    names = [ADAPTER.layout.factors[i].name for i in FedSB().live(ADAPTER, 3).indices]
    squares = [f"block.{b}.{target}.lora_r" for b in (1, 2) for target in ("query", "value")]
    assert names == [*squares, "head.weight", "head.bias"]
    assert ADAPTER.layout.size == 4 * 3**2 + 4 * 16 + 4  # r² whatever the widths, and the head


def test_it_starts_as_the_identity() -> None:
    theta = initial_theta(ADAPTER, 0)
    assert len(products(ADAPTER, theta)) == 4
    assert not any(product.any() for product in products(ADAPTER, theta))


def test_the_mean_of_the_square_matrices_is_that_of_the_products() -> None:
    live, rng = FedSB().live(ADAPTER, 1), np.random.default_rng(1)
    given_ = [
        Contribution(delta=rng.standard_normal(live.size).astype(np.float32), examples=n) for n in (3, 5, 1)
    ]
    spec = TaskSpec(name="t", rounds=RoundSpec(count=1, cohort=1), method=FedSB())
    found = products(ADAPTER, server_step(spec, ADAPTER, {None: THETA}, live, given_, None).theta)
    sent = [products(ADAPTER, THETA + live.scatter(c.delta)) for c in given_]
    for number, product in enumerate(found):
        mean = sum(c.examples / 9 * one[number] for c, one in zip(given_, sent, strict=True))
        np.testing.assert_allclose(product, mean, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("turns", range(1, 7))
def test_in_turns_every_number_is_live_once(turns: int) -> None:
    rounds = [FedSB(turns=turns).live(ADAPTER, number).indices for number in range(1, turns + 1)]
    assert sorted(index for round_ in rounds for index in round_) == list(ADAPTER.layout.everything.indices)
    longer = FedSB(turns=turns, epoch_rounds=3)
    assert [longer.live(ADAPTER, number).indices for number in (1, 3, 3 * turns, 3 * turns + 1)] == [
        rounds[0], rounds[0], rounds[-1], rounds[0]
    ]  # fmt: skip


def test_the_head_has_a_turn_of_its_own_where_it_is_half_of_the_numbers() -> None:
    sizes = {name: array.size for name, array in ADAPTER.layout.unflatten(THETA).items()}
    assert sizes["head.weight"] + sizes["head.bias"] == 68
    rounds = [FedSB(turns=2).live(ADAPTER, number) for number in (1, 2)]
    assert [live.size for live in rounds] == [4 * 3**2, 68]


def test_more_turns_than_factors_are_refused() -> None:
    FedSB(turns=6).check(ADAPTER)
    with pytest.raises(ConfigError, match=r"method\.turns = 7 is not allowed: at most 6, a factor"):
        FedSB(turns=7).check(ADAPTER)


@given(st.lists(st.integers(1, 50), min_size=1, max_size=8), st.integers(1, 5))
def test_the_largest_part_is_as_small_as_any_cut_makes_it(sizes: list[int], parts: int) -> None:
    def largest(cut: list[tuple[int, int]]) -> int:
        return max(sum(sizes[first:end]) for first, end in cut)

    parts = min(parts, len(sizes))
    found = _even_parts(sizes, parts)
    assert len(found) == parts
    assert all(first < end for first, end in found)
    assert [index for first, end in found for index in range(first, end)] == list(range(len(sizes)))
    others = (
        list(pairwise((0, *inner, len(sizes))))
        for count in range(parts)
        for inner in combinations(range(1, len(sizes)), count)
    )
    assert largest(found) == min(map(largest, others))
