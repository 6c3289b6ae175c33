from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_client.passes import (
    Pass,
    PassLimits,
    in_passes,
    padded_tokens,
    passes_in_order,
    plan_passes,
)
from edge_client.tokens import Batch
from fedtt.errors import ConfigError
from fedtt.layout import Theta

LENGTHS = st.lists(st.integers(0, 40), max_size=60)
LIMITS = st.builds(
    PassLimits,
    tokens=st.integers(1, 200),
    rows=st.none() | st.integers(1, 9),
    overhead_tokens=st.integers(0, 50),
)


def _plan(lengths: list[int], limits: PassLimits, least: int = 3) -> list[Pass]:
    return plan_passes(np.array(lengths, np.intp), limits, least=least)


@given(LENGTHS, LIMITS)
def test_every_row_is_in_one_pass_that_is_wide_enough_and_within_the_limit(
    lengths: list[int], limits: PassLimits
) -> None:
    passes = _plan(lengths, limits)
    assert sorted(row for part in passes for row in part.rows.tolist()) == list(range(len(lengths)))
    for part in passes:
        assert part.width == max(3, *(lengths[row] for row in part.rows))
        assert part.rows.tolist() == sorted(part.rows.tolist())
        assert len(part.rows) == 1 or len(part.rows) * part.width <= limits.tokens
        assert len(part.rows) <= (limits.rows or len(lengths))


@given(LENGTHS, LIMITS)
def test_rows_in_their_order_are_each_in_one_pass_within_the_limit_and_no_pass_ends_early(
    lengths: list[int], limits: PassLimits
) -> None:
    passes = [range(*part.indices(len(lengths))) for part in passes_in_order(lengths, limits, least=3)]
    assert [row for part in passes for row in part] == list(range(len(lengths)))

    def fits(count: int, rows: range) -> bool:
        width = max(3, *(lengths[row] for row in rows))
        return count == 1 or (count * width <= limits.tokens and count <= (limits.rows or count))

    for number, part in enumerate(passes):
        assert fits(len(part), part)
        if number + 1 < len(passes):
            assert not fits(len(part) + 1, range(part.start, part.stop + 1))


@given(st.lists(st.integers(1, 12), min_size=1, max_size=25), st.integers(0, 30))
def test_no_other_cuts_between_lengths_cost_less(lengths: list[int], overhead: int) -> None:
    limits = PassLimits(tokens=10**6, overhead_tokens=overhead)
    found = _plan(lengths, limits, least=1)
    levels = sorted(set(lengths))
    costs = []
    for count in range(len(levels)):
        for inner in itertools.combinations(range(1, len(levels)), count):
            cuts = [0, *inner, len(levels)]
            groups = [levels[a:b] for a, b in itertools.pairwise(cuts)]
            costs.append(sum(sum(lengths.count(n) for n in g) * g[-1] + overhead for g in groups))
    assert padded_tokens(found) + overhead * len(found) == min(costs)


def test_the_rows_of_a_hundred_devices_need_hardly_any_padding() -> None:
    lengths = np.clip(np.random.default_rng(0).normal(12, 4, 1600), 4, 40).astype(np.intp)
    passes = plan_passes(lengths, PassLimits())
    assert 1 - lengths.sum() / padded_tokens(passes) < 0.02
    assert len(passes) < 40


def test_the_same_lengths_give_the_same_passes() -> None:
    lengths = [5, 9, 5, 7, 5, 30, 9]
    first, second = (_plan(lengths, PassLimits(tokens=40)) for _ in range(2))
    assert [(p.rows.tolist(), p.width) for p in first] == [(p.rows.tolist(), p.width) for p in second]


def test_no_rows_need_no_pass() -> None:
    assert _plan([], PassLimits()) == []


@pytest.mark.parametrize(("name", "value"), [("tokens", 0), ("overhead_tokens", -1)])
def test_limits_that_make_no_sense_are_refused(name: str, value: int) -> None:
    with pytest.raises(ConfigError, match=f"passes.{name} = {value}"):
        PassLimits(**{name: value})


def rows_of(lengths: list[int]) -> Batch:
    """Row n holds the number n + 1, as often as it is long."""
    mask = (np.arange(max(lengths)) < np.array(lengths)[:, None]).astype(np.int64)
    return Batch(ids=mask * np.arange(1, len(lengths) + 1)[:, None], mask=mask)


def mean_over_rows(batch: Batch) -> tuple[float, Theta]:
    """Each row's value is its number."""
    value = float(batch.ids[:, 0].mean())
    return value, np.full(2, value, np.float32)


def mean_over_tokens(batch: Batch) -> tuple[float, Theta]:
    """Each token that follows another is worth the number of its row."""
    value = float(batch.ids[:, 1:].sum() / max(1, batch.mask[:, 1:].sum()))
    return value, np.full(2, value, np.float32)


@pytest.mark.parametrize("by_tokens", [False, True])
@given(lengths=st.lists(st.integers(1, 30), min_size=1, max_size=12), overhead=st.integers(0, 40))
def test_the_means_over_passes_are_those_over_the_batch(
    by_tokens: bool, lengths: list[int], overhead: int
) -> None:
    batch, mean = rows_of(lengths), mean_over_tokens if by_tokens else mean_over_rows
    limits = PassLimits(tokens=64, overhead_tokens=overhead)
    loss, gradient = in_passes(batch, limits, mean, least=1, by_tokens=by_tokens)
    expected_loss, expected = mean(batch)
    assert loss == pytest.approx(expected_loss, rel=1e-6)
    np.testing.assert_allclose(gradient, expected, rtol=1e-6)


def test_a_batch_of_rows_of_one_length_goes_through_as_it_is() -> None:
    batch, seen = rows_of([7] * 5), []

    def note(part: Batch) -> tuple[float, Theta]:
        seen.append(part)
        return mean_over_rows(part)

    in_passes(batch, PassLimits(), note, least=3, by_tokens=False)
    assert seen == [batch]
