"""What groups train, whatever their depth, and which tasks and bundles cannot train in groups."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from msgspec.structs import replace

from fedtt.algorithms import HierFedLoRA, HierFedTT
from fedtt.errors import ConfigError
from fedtt.folds import Median
from fedtt.kinds import HeadKind
from fedtt.sampling import Uniform
from tests.support.adapters import small_adapter
from tests.support.groups import ADAPTER, grouped_task
from tests.support.tiny import tiny_spec

KINDS = [(HierFedLoRA(), "lora"), (HierFedTT(), "tt")]


@pytest.mark.parametrize(("method", "kind"), KINDS, ids=["lora", "tt"])
@pytest.mark.parametrize("head", ["dense", "tt", None])
def test_a_group_trains_the_last_blocks_and_the_head(method: Any, kind: Any, head: HeadKind | None) -> None:
    """Of six blocks the last four have adapters: blocks 2, 3, 4 and 5."""
    adapter = small_adapter(kind, hidden=12, layers=6, depth=4, head=head)
    method.check(adapter)
    for depth in range(1, 5):
        live = set(method.live_at(adapter, depth).indices)
        names = [factor.name for factor in adapter.layout.factors]
        meant = (*(f"block.{number}." for number in range(6 - depth, 6)), "head")
        assert live == {i for i, name in enumerate(names) if name.startswith(meant)}
    assert live == set(adapter.layout.everything.indices)


@pytest.mark.parametrize(("method", "kind"), KINDS, ids=["lora", "tt"])
def test_the_warm_up_trains_all_there_is(method: Any, kind: Any) -> None:
    adapter = small_adapter(kind, hidden=12, layers=3, head="tt")
    assert all(method.live(adapter, number) == adapter.layout.everything for number in range(3))


@pytest.mark.parametrize(("method", "kind"), [(HierFedLoRA(), "tt"), (HierFedTT(), "lora")])
def test_adapters_of_the_other_kind_are_refused(method: Any, kind: Any) -> None:
    with pytest.raises(ConfigError, match="hier-fed"):
        method.check(small_adapter(kind, hidden=12, layers=3, head="dense"))


@pytest.mark.parametrize(
    ("rounds", "method", "more", "complaint"),
    [
        ({"cohort": 1}, {}, {}, "rounds.cohort = 1 .* at least 2"),
        ({"cohort": 5, "quorum": 3}, {}, {"fold": Median()}, "rounds.cohort = 5 .* at least 6"),
        ({"count": 2}, {"warmup_rounds": 2}, {}, "method.warmup_rounds = 2 .* below rounds.count = 2"),
        ({}, {}, {"sampling": Uniform(separation=2)}, "sampling.separation = 2 .* 0 with groups"),
        ({}, {"label_source": "updates"}, {}, "method.label_epsilon = 1.0 .* asks no device"),
        ({"max_staleness": 1}, {}, {}, "rounds.max_staleness = 1 .* 0 with hier-fedtt"),
    ],
)
def test_a_task_that_cannot_train_in_groups_is_refused(
    rounds: dict[str, Any], method: dict[str, Any], more: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(ConfigError, match=complaint):
        replace(grouped_task({"count": 9} | rounds, method), **more)


def test_options_that_do_not_fit_the_bundle_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"method\.min_depth = 4 .* at most 3"):
        HierFedTT(min_depth=4).check(ADAPTER)
    with pytest.raises(ConfigError, match=r"method\.label_epsilon = 1\.0 .* only for a bundle with labels"):
        HierFedTT(label_epsilon=1.0).check(replace(tiny_spec(), head=None))
    with pytest.raises(
        ConfigError, match=r"method\.label_source = 'updates' .* only for a bundle with labels"
    ):
        HierFedTT(label_source="updates").check(replace(tiny_spec(), head=None))
    HierFedTT(label_source="updates").check(ADAPTER)


def test_a_plan_leaves_out_what_is_as_it_mostly_is() -> None:
    """So that clients which do not know `label_source` take plans of tasks without it."""
    assert msgspec.json.encode(HierFedLoRA()) == b'{"name":"hier-fedlora"}'
    assert msgspec.json.decode(msgspec.json.encode(HierFedTT(label_source="updates"))) == {
        "name": "hier-fedtt",
        "label_source": "updates",
    }
