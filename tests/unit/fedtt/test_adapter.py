from __future__ import annotations

import math

import msgspec
import numpy as np
import pytest

from fedtt.adapter import AdapterSpec, initial_theta
from fedtt.errors import ConfigError
from fedtt.kinds import AdapterKind, HeadKind, HeadSpec, Lora, TTBottleneck
from fedtt.planning import plan_adapter, plan_dense, plan_head, plan_lora, plan_tt
from fedtt.tensor_train import TTMatrix, tt_dense
from tests.support.adapters import KINDS, small_adapter


def names(spec: AdapterSpec) -> list[str]:
    return [factor.name for factor in spec.layout.factors]


# names and order


def test_tt_factors_are_named_by_block_site_matrix_and_core_in_the_order_of_the_model() -> None:
    spec = small_adapter("tt", hidden=64, layers=3, depth=2, head="tt")
    down = [f"block.1.attention.down.{k}" for k in range(3)]  # 8·8 | 8
    up = [f"block.1.attention.up.{k}" for k in range(3)]  # 8 | 8·8
    assert names(spec)[:6] == down + up
    assert names(spec)[6] == "block.1.mlp.down.0"
    assert names(spec)[12] == "block.2.attention.down.0"  # 2 sites of 6 cores: 12 factors a block
    assert names(spec)[24:] == ["head.weight.0", "head.weight.1", "head.weight.2", "head.bias"]


def test_dense_factors_are_whole_matrices() -> None:
    spec = small_adapter("dense", hidden=16, layers=2, depth=1)
    assert [(f.name, f.shape) for f in spec.layout.factors] == [
        ("block.1.attention.down", (16, 8)),
        ("block.1.attention.up", (8, 16)),
        ("block.1.mlp.down", (16, 8)),
        ("block.1.mlp.up", (8, 16)),
    ]


def test_lora_factors_have_the_sizes_of_their_projections() -> None:
    spec = small_adapter("lora", hidden=16, layers=2, depth=1, narrow=4, head="dense", labels=3)
    assert [(f.name, f.shape) for f in spec.layout.factors] == [
        ("block.1.query.lora_a", (2, 16)),
        ("block.1.query.lora_b", (16, 2)),
        ("block.1.value.lora_a", (2, 16)),
        ("block.1.value.lora_b", (4, 2)),
        ("head.weight", (3, 16)),
        ("head.bias", (3,)),
    ]


def test_head_only_has_the_heads_factors_alone() -> None:
    assert names(small_adapter("none", hidden=16, layers=2, head="dense")) == ["head.weight", "head.bias"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_spec_comes_back_from_json_as_it_went_and_says_its_kind(kind: AdapterKind) -> None:
    spec = small_adapter(kind, hidden=16, layers=2, head="label-names")
    data = msgspec.json.encode(spec)
    assert msgspec.json.decode(data, type=AdapterSpec) == spec
    assert msgspec.json.decode(data)["inserted"]["kind"] == kind == spec.inserted.kind


@pytest.mark.parametrize("kind", KINDS)
def test_the_adapters_numbers_stand_before_the_heads(kind: AdapterKind) -> None:
    spec = small_adapter(kind, hidden=16, layers=2, head="tt")
    heads = sum(factor.size for factor in spec.layout.factors if factor.name.startswith("head."))
    assert spec.adapter_size == spec.layout.size - heads


# what methods ask


@pytest.mark.parametrize("kind", KINDS)
def test_each_factor_belongs_to_the_block_in_its_name_or_to_the_head(kind: AdapterKind) -> None:
    spec = small_adapter(kind, hidden=16, layers=5, depth=2, head="tt")
    for index, name in enumerate(names(spec)):
        expected = int(name.split(".")[1]) if name.startswith("block.") else None
        assert spec.block_of(index) == expected, name
    for outside in (-1, len(names(spec))):
        with pytest.raises(IndexError, match="there is no number"):
            spec.block_of(outside)


def test_every_tt_matrix_is_found_with_its_cores_and_the_heads_with_them() -> None:
    spec = small_adapter("tt", hidden=64, layers=3, depth=2, head="label-names")
    found = {prefix: (matrix, list(indices)) for prefix, matrix, indices in spec.tt_matrices}
    assert list(found) == [
        *(
            f"block.{b}.{site}.{way}"
            for b in (1, 2)
            for site in ("attention", "mlp")
            for way in ("down", "up")
        ),
        "head.weight",
    ]
    for prefix, (matrix, indices) in found.items():
        assert [names(spec)[i] for i in indices] == [f"{prefix}.{k}" for k in range(len(matrix.modes))]
        assert [spec.layout.factors[i].shape for i in indices] == list(matrix.core_shapes)
    assert isinstance(spec.inserted, TTBottleneck)
    assert found["block.2.mlp.up"][0] == spec.inserted.up


def test_other_adapters_have_no_tt_matrix_but_that_of_a_head() -> None:
    assert small_adapter("dense", hidden=16, layers=2, head="dense").tt_matrices == ()
    (head,) = small_adapter("lora", hidden=16, layers=2, head="tt").tt_matrices
    assert (head.prefix, head.indices.start) == ("head.weight", 8)  # after 2 blocks x 2 targets x 2


def test_every_lora_pair_is_found_with_its_a_and_b() -> None:
    spec = small_adapter("lora", hidden=16, layers=3, depth=2, head="dense")
    prefixes = [f"block.{block}.{target}" for block in (1, 2) for target in ("query", "value")]
    assert [pair.prefix for pair in spec.lora_pairs] == prefixes
    for prefix, a, b in spec.lora_pairs:
        assert (names(spec)[a], names(spec)[b]) == (f"{prefix}.lora_a", f"{prefix}.lora_b")
    assert small_adapter("tt", hidden=16, layers=2).lora_pairs == ()


# ranks


def test_a_smaller_rank_changes_the_adapters_and_leaves_the_head() -> None:
    spec = small_adapter("tt", hidden=64, layers=2, rank=4, head="tt")
    small = spec.at_rank(3)
    assert small == small_adapter("tt", hidden=64, layers=2, rank=3, head="tt")
    assert small.head == spec.head
    assert names(small) == names(spec)


def test_the_heads_rank_changes_where_it_is_named() -> None:
    spec = small_adapter("lora", hidden=64, layers=2, head="tt")
    head = spec.at_rank(2, head_rank=1).head
    assert head is not None
    assert head.matrix is not None
    assert head.matrix.rank == 1


def test_lora_at_a_smaller_rank_keeps_its_scale() -> None:
    small = small_adapter("lora", hidden=16, layers=2, rank=4).at_rank(3).inserted
    assert isinstance(small, Lora)
    assert (small.rank, small.alpha, small.scale) == (3, 6.0, 2.0)  # 8 · 3 / 4


@pytest.mark.parametrize(
    ("kind", "rank", "head_rank", "complaint"),
    [
        ("tt", 3, None, "rank = 3 .*from 1 to 2"),
        ("lora", 0, None, "rank = 0 .*from 1 to 2"),
        ("dense", 1, None, "only for tt and lora adapters"),
        ("none", 1, None, "only for tt and lora adapters"),
        ("tt", 1, 3, "head_rank = 3 .*from 1 to 2"),
    ],
)
def test_a_rank_that_is_not_there_is_refused(
    kind: AdapterKind, rank: int, head_rank: int | None, complaint: str
) -> None:
    spec = small_adapter(kind, hidden=16, layers=2, head="tt")
    with pytest.raises(ConfigError, match=complaint):
        spec.at_rank(rank, head_rank=head_rank)


def test_a_heads_rank_is_refused_where_its_head_has_none() -> None:
    for head in ("dense", None):
        with pytest.raises(ConfigError, match=r"head_rank = 1 .*only for a head with a TT matrix"):
            small_adapter("tt", hidden=16, layers=2, head=head).at_rank(1, head_rank=1)


@pytest.mark.parametrize(
    ("kind", "matrix", "complaint"),
    [
        ("dense", TTMatrix((4, 4), (4,), 2), "head.kind = 'dense'"),
        ("tt", None, "head.kind = 'tt'"),
        ("tt", TTMatrix((4, 4), (3,), 2), "head.matrix = 3 .*at least 4"),
    ],
)
def test_a_head_whose_matrix_does_not_fit_its_kind_is_refused(
    kind: HeadKind, matrix: TTMatrix | None, complaint: str
) -> None:
    with pytest.raises(ConfigError, match=complaint):
        HeadSpec(kind=kind, labels=4, matrix=matrix)


def test_two_matrices_that_do_not_meet_in_one_bottleneck_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"adapter\.up = 4 .*bottleneck of down, 8"):
        TTBottleneck(sites=("mlp",), down=TTMatrix((4, 4), (8,), 2), up=TTMatrix((4,), (4, 4), 2))


# first values


@pytest.mark.parametrize("head", ["label-names", "dense"])
def test_at_the_start_every_tt_adapter_is_the_identity_and_the_heads_delta_is_zero(head: HeadKind) -> None:
    inserted = plan_tt(hidden=64, bottleneck=16, rank=3)
    spec = plan_adapter(inserted, hidden=64, layers=2, head=plan_head(head, hidden=64, labels=5, rank=4))
    named = spec.layout.unflatten(initial_theta(spec, seed=1))
    for block in spec.blocks:
        for site in inserted.sites:
            prefix = f"block.{block}.{site}"
            up = [named[f"{prefix}.up.{k}"] for k in range(len(inserted.up.modes))]
            down = [named[f"{prefix}.down.{k}"] for k in range(len(inserted.down.modes))]
            assert not tt_dense(up, inserted.up.split).any()  # h + up(…) = h
            assert tt_dense(down, inserted.down.split).any()  # but a gradient can flow
            assert all(core.any() for core in up[:-1])
    assert not named["head.bias"].any()
    if spec.head and spec.head.matrix:
        delta = [named[f"head.weight.{k}"] for k in range(len(spec.head.matrix.modes))]
        assert not tt_dense(delta, spec.head.matrix.split).any()
    else:
        assert not named["head.weight"].any()


@pytest.mark.parametrize(("kind", "random", "zero"), [("dense", "down", "up"), ("lora", "lora_a", "lora_b")])
def test_at_the_start_one_factor_of_each_product_is_zero_and_the_other_random(
    kind: AdapterKind, random: str, zero: str
) -> None:
    spec = small_adapter(kind, hidden=16, layers=2)
    named = spec.layout.unflatten(initial_theta(spec, seed=1))
    assert {name.rpartition(".")[2] for name in named} == {random, zero}
    assert all(value.all() for name, value in named.items() if name.endswith(random))
    assert not any(value.any() for name, value in named.items() if name.endswith(zero))


def test_a_tt_head_starts_random() -> None:
    spec = small_adapter("none", hidden=64, layers=1, head="tt", labels=5)
    named = spec.layout.unflatten(initial_theta(spec, seed=1))
    assert all(named[f"head.weight.{k}"].any() for k in range(3))


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_seed_gives_the_same_bits_and_another_seed_others(kind: AdapterKind) -> None:
    spec = small_adapter(kind, hidden=64, layers=1, head="tt")
    assert initial_theta(spec, 3).tobytes() == initial_theta(spec, 3).tobytes()
    assert initial_theta(spec, 3).tobytes() != initial_theta(spec, 4).tobytes()
    assert initial_theta(spec, 3).dtype == np.float32


def test_random_trains_start_with_dense_entries_of_variance_one_over_d_in() -> None:
    inserted = plan_tt(hidden=64, bottleneck=16, rank=4)
    spec = plan_adapter(inserted, hidden=64, layers=1)
    squares = []
    for seed in range(300):
        named = spec.layout.unflatten(initial_theta(spec, seed))
        down = [named[f"block.0.mlp.down.{k}"] for k in range(len(inserted.down.modes))]
        squares.append(float(np.mean(tt_dense(down, inserted.down.split) ** 2)))
    # the mean square of one draw varies by a factor; over 300 draws its own standard error is small
    error = np.std(squares) / math.sqrt(len(squares))
    assert abs(np.mean(squares) - 1 / 64) < 4 * error
    assert error < 0.2 / 64


def test_random_matrices_start_with_variance_one_over_d_in() -> None:
    dense = plan_adapter(plan_dense(hidden=256), hidden=256, layers=1)
    lora = plan_adapter(plan_lora({"query": (256, 64)}, targets=("query",), rank=64), hidden=256, layers=1)
    for spec, name in ((dense, "block.0.mlp.down"), (lora, "block.0.query.lora_a")):
        values = spec.layout.unflatten(initial_theta(spec, 0))[name]
        # 16,384 draws: the standard error of their mean square is sqrt(2 / 16384) = 1.1 % of it
        assert float(np.mean(values**2)) == pytest.approx(1 / 256, rel=0.045)
