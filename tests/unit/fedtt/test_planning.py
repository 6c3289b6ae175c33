from __future__ import annotations

from typing import Any

import pytest

from fedtt.errors import ConfigError
from fedtt.kinds import HeadOnly, Target
from fedtt.planning import plan_adapter, plan_dense, plan_head, plan_lora, plan_tt

PROJECTIONS: dict[Target, tuple[int, int]] = {"query": (16, 16), "value": (16, 8)}


def test_minilm_with_fedtts_defaults_trains_16660_numbers() -> None:
    inserted = plan_tt(hidden=384)
    spec = plan_adapter(inserted, hidden=384, layers=6, head=plan_head("dense", hidden=384, labels=4))
    # down 8·8·6 | 8·8 at rank 5: 40 + 200 + 150 + 200 + 40 = 630, up 8·8 | 6·8·8 the same, on 6·2 sites;
    # head 4·384 + 4 = 1540; together 12 · (630 + 630) + 1540 = 16660
    assert (inserted.down.size, inserted.up.size) == (630, 630)
    assert spec.layout.size == 16_660


def test_the_baselines_defaults_are_those_of_their_papers() -> None:
    dense = plan_adapter(plan_dense(hidden=384), hidden=384, layers=6)
    assert dense.layout.size == 589_824  # 12 sites · 2 · 384 · 64
    sizes: dict[Target, tuple[int, int]] = {"query": (384, 384), "value": (384, 384)}
    lora = plan_lora(sizes)
    assert (lora.rank, lora.scale, [t.name for t in lora.targets]) == (8, 1.0, ["query", "value"])
    assert plan_adapter(lora, hidden=384, layers=6).layout.size == 73_728  # 12 · 8 · (384 + 384)


def test_a_narrow_model_has_its_own_width_for_a_bottleneck() -> None:
    assert plan_tt(hidden=32).down.d_out == 32
    assert plan_dense(hidden=32).bottleneck == 32


def test_given_modes_are_used_in_both_directions_and_by_the_head() -> None:
    inserted = plan_tt(hidden=16, bottleneck=4, rank=2, hidden_modes=(2, 8), bottleneck_modes=(4,))
    assert (inserted.down.in_modes, inserted.down.out_modes) == ((2, 8), (4,))
    assert (inserted.up.in_modes, inserted.up.out_modes) == ((4,), (8, 2))
    head = plan_head("tt", hidden=16, labels=3, rank=2, hidden_modes=(2, 8))
    assert head.matrix is not None
    assert head.matrix.in_modes == (2, 8)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"bottleneck": 0}, r"adapter\.bottleneck = 0 .* from 1 to 16"),
        ({"bottleneck": 17}, r"adapter\.bottleneck = 17"),
        ({"rank": 0}, r"adapter\.rank = 0 .* from 1 to 4"),
        ({"rank": 5}, r"adapter\.rank = 5"),
        ({"sites": ()}, r"adapter\.sites = \(\)"),
        ({"sites": ("mlp", "mlp")}, r"adapter\.sites = \('mlp', 'mlp'\)"),
        ({"hidden_modes": (4, 3)}, r"adapter\.hidden_modes = \(4, 3\) .*multiply to 16"),
        ({"hidden_modes": (-4, -4)}, r"adapter\.hidden_modes = \(-4, -4\) .*positive"),
        ({"bottleneck_modes": ()}, r"adapter\.bottleneck_modes = \(\) .*multiply to 4"),
    ],
)
def test_a_tt_plan_that_cannot_be_built_is_refused(change: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        plan_tt(**{"hidden": 16, "bottleneck": 4, "rank": 2, **change})


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"rank": 0}, r"adapter\.rank = 0 .* from 1 to 8"),
        ({"rank": 9}, r"adapter\.rank = 9 .* from 1 to 8"),  # value has only 8 outputs
        ({"alpha": 0.0}, r"adapter\.alpha = 0\.0 .*above 0"),
        ({"alpha": float("nan")}, r"adapter\.alpha = nan"),
        ({"targets": ()}, r"adapter\.targets = \(\)"),
        ({"targets": ("query", "query")}, r"adapter\.targets"),
        ({"targets": ("key",)}, r"adapter\.targets = 'key' .*query"),
    ],
)
def test_a_lora_plan_that_cannot_be_built_is_refused(change: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        plan_lora(PROJECTIONS, **{"rank": 2, **change})


@pytest.mark.parametrize(
    ("bottleneck", "complaint"), [(0, r"bottleneck = 0 .* from 1 to 16"), (17, r"bottleneck = 17")]
)
def test_a_dense_plan_that_cannot_be_built_is_refused(bottleneck: int, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        plan_dense(hidden=16, bottleneck=bottleneck)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"labels": 1}, "labels = 1 .*at least 2"),
        ({"rank": 0}, "head_rank = 0"),
        ({"rank": 4}, "head_rank = 4 .*from 1 to 3"),  # no bond of a 16 x 3 matrix has more
    ],
)
def test_a_head_that_cannot_be_built_is_refused(change: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        plan_head("tt", **{"hidden": 16, "labels": 3, **change})


def test_a_default_rank_is_cut_where_a_given_one_is_refused() -> None:
    head = plan_head("tt", hidden=16, labels=3)
    assert head.matrix is not None
    assert max(head.matrix.ranks) == 3
    assert max(plan_tt(hidden=16, bottleneck=4).down.ranks) == 4


@pytest.mark.parametrize("depth", [0, 3, -1])
def test_a_depth_beyond_the_blocks_is_refused(depth: int) -> None:
    with pytest.raises(ConfigError, match=rf"adapter\.depth = {depth} .* from 1 to 2"):
        plan_adapter(plan_dense(hidden=16), hidden=16, layers=2, depth=depth)


def test_nothing_inserted_needs_a_head_and_has_no_depth() -> None:
    with pytest.raises(ConfigError, match=r"adapter = 'none' .*without one nothing would be trained"):
        plan_adapter(HeadOnly(), hidden=16, layers=2)
    head = plan_head("dense", hidden=16, labels=2)
    with pytest.raises(ConfigError, match=r"adapter\.depth = 1 .*0 where nothing is inserted"):
        plan_adapter(HeadOnly(), hidden=16, layers=2, depth=1, head=head)
    assert plan_adapter(HeadOnly(), hidden=16, layers=2, head=head).layout.size == 34  # 2 · 16 + 2


def test_an_adapter_for_another_width_is_refused() -> None:
    for inserted in (plan_tt(hidden=16), plan_dense(hidden=16)):
        with pytest.raises(ConfigError, match=r"adapter\.hidden = 32 .*16, the width of its matrices"):
            plan_adapter(inserted, hidden=32, layers=2)
    head = plan_head("tt", hidden=16, labels=2)
    with pytest.raises(ConfigError, match=r"adapter\.hidden = 32"):
        plan_adapter(plan_lora(PROJECTIONS, rank=2), hidden=32, layers=2, head=head)
