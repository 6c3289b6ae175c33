"""What a device tells of its labels: nothing unasked, nothing unless allowed, and the same for ever."""

from __future__ import annotations

import random
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest

from edge_client.consent import consent_text
from edge_client.device_config import DeviceConfig
from edge_client.examples import Example, Shard
from edge_client.home import Home
from edge_client.journal import Journal
from edge_client.label_counts import LABEL_SETS, secure_uniform, told_labels
from fedtt.errors import ConfigError, DataError
from fedtt.label_counts import decode_label_counts

LABELS = ("no", "yes", "perhaps")
SHARD = Shard([Example("a", "yes"), Example("b", 1), Example("c", "no")])


def test_the_same_list_is_told_again_after_a_restart_whatever_has_changed(tmp_path: Path) -> None:
    first = told_labels(Journal(Home(tmp_path)), SHARD, LABELS, 0.5)
    assert len(first) == 6
    other = Shard([Example("d", "perhaps")] * 50)
    assert told_labels(Journal(Home(tmp_path)), other, LABELS, 100.0) == first


def test_labels_in_another_order_are_the_same_set_and_draw_no_noise_anew(tmp_path: Path) -> None:
    journal = Journal(Home(tmp_path))
    told = {
        frozenset(
            zip(
                order,
                decode_label_counts(told_labels(journal, SHARD, order, 0.5), 3).tolist(),
                strict=True,
            )
        )
        for order in permutations(LABELS)
    }
    assert len(told) == len(journal.state.label_counts) == 1


def test_noise_is_fresh_on_each_device(tmp_path: Path) -> None:
    told = {told_labels(Journal(Home(tmp_path / f"{n}")), SHARD, LABELS, 0.1) for n in range(8)}
    assert len(told) == 8


def test_noise_comes_from_the_draws_it_is_given_and_next_to_none_leaves_the_counts(tmp_path: Path) -> None:
    draws = [random.Random(1).random for _ in range(2)]  # noqa: S311  # a test
    told = [
        told_labels(Journal(Home(tmp_path / f"{n}")), SHARD, LABELS, 0.5, draw)
        for n, draw in enumerate(draws)
    ]
    assert told[0] == told[1]
    exact = told_labels(Journal(Home(tmp_path / "exact")), SHARD, LABELS, 100.0, lambda: 0.5)
    np.testing.assert_array_equal(decode_label_counts(exact, 3), [1, 2, 0])


def test_only_so_many_sets_of_labels_are_told_of_and_those_stay(tmp_path: Path) -> None:
    journal = Journal(Home(tmp_path))
    first = told_labels(journal, Shard([]), ("set 0",), 1.0)
    for number in range(1, LABEL_SETS):
        assert told_labels(journal, Shard([]), (f"set {number}",), 1.0)
    assert told_labels(journal, Shard([]), ("one more",), 1.0) == b""
    assert told_labels(journal, Shard([]), ("set 0",), 1.0) == first


@pytest.mark.parametrize("labels", [(), tuple(map(str, range(4097)))])
def test_without_labels_or_with_too_many_nothing_is_told(labels: tuple[str, ...], tmp_path: Path) -> None:
    assert told_labels(Journal(Home(tmp_path)), SHARD, labels, 1.0) == b""


def test_an_example_of_another_task_is_an_error_and_nothing_is_kept(tmp_path: Path) -> None:
    journal = Journal(Home(tmp_path))
    with pytest.raises(DataError):
        told_labels(journal, SHARD, ("red", "blue"), 1.0)
    assert journal.state.label_counts == {}


def test_the_secure_source_gives_numbers_in_the_unit_interval() -> None:
    draws = [secure_uniform() for _ in range(100)]
    assert all(0 <= draw < 1 for draw in draws)
    assert len(set(draws)) == 100


@pytest.mark.parametrize("epsilon", [-0.1, 100.5, float("nan")])
def test_an_epsilon_out_of_range_is_refused(epsilon: float) -> None:
    with pytest.raises(ConfigError, match="label_epsilon"):
        DeviceConfig(label_epsilon=epsilon)


def test_the_owner_is_told_what_is_told() -> None:
    silent = consent_text("https://a.org", Path("/home"), 5)
    telling = consent_text("https://a.org", Path("/home"), 5, label_epsilon=0.5)
    assert "how many examples of each label" not in silent
    assert "how many examples of each label you have, made vague by random noise (epsilon 0.5)" in telling
    assert "Never sent: your texts and which label each has." in telling
