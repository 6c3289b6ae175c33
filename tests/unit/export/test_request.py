from __future__ import annotations

from typing import Any

import pytest

from export.request import ExportRequest
from fedtt.adapter import AdapterSpec
from fedtt.errors import ConfigError
from fedtt.kinds import DenseBottleneck, HeadOnly, Lora, Target, TTBottleneck

PROJECTIONS: dict[Target, tuple[int, int]] = {"query": (32, 32), "value": (32, 16), "key": (32, 16)}


def plan(**options: Any) -> AdapterSpec:
    request = ExportRequest(**{"model": "m", "labels": ("no", "yes"), **options})
    return request.plan(hidden=32, layers=2, projections=PROJECTIONS)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"task": "translation"}, "task = 'translation'"),
        ({"task": "causal-lm"}, "none for causal-lm"),
        ({"task": "causal-lm", "labels": (), "head": "tt"}, "head = 'tt' .*none for causal-lm"),
        ({"task": "causal-lm", "labels": (), "head_rank": 2}, "head_rank = 2 .*none for causal-lm"),
        ({"task": "causal-lm", "labels": (), "adapter": "none"}, "adapter = 'none' .*only with a head"),
        ({"head": "mlp"}, "head = 'mlp'"),
        ({"head": "dense", "head_rank": 2}, "head_rank = 2 .*label-names and tt"),
        ({"sites": ("attention", "ffn")}, "sites = 'ffn'"),
        ({"adapter": "lora", "targets": ("query", "gate")}, "targets = 'gate' .*query, key, value, output"),
        ({"base": "int4"}, "base = 'int4' .*fp32, fp16, int8"),
        ({"products": "int8"}, "products = 'int8' .*only with base = 'int8'"),
        ({"products": "fp16"}, "products = 'fp16' .*one of fp32, int8"),
        ({"adapter": "prefix"}, "adapter = 'prefix' .*tt, dense, lora, lora-sb, none"),
    ],
)
def test_nonsense_is_refused_when_the_request_is_made(change: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        ExportRequest(**{"model": "m", "labels": ("no", "yes"), **change})


FOREIGN: list[tuple[str, dict[str, Any]]] = [
    ("tt", {"alpha": 8.0}),
    ("tt", {"targets": ("query",)}),
    ("dense", {"rank": 4}),
    ("dense", {"bottleneck_modes": (8,)}),
    ("dense", {"alpha": 8.0}),
    ("lora", {"bottleneck": 8}),
    ("lora", {"sites": ("mlp",)}),
    ("none", {"depth": 1}),
    ("none", {"rank": 4}),
    ("lora", {"hidden_modes": (8, 4), "head": "dense"}),
]


@pytest.mark.parametrize(("kind", "option"), FOREIGN)
def test_an_option_that_the_kind_does_not_have_is_refused_with_those_it_has(
    kind: Any, option: dict[str, Any]
) -> None:
    name = next(iter(option))
    with pytest.raises(ConfigError, match=rf"^{name} = .*not an option of a {kind} adapter, which has") as e:
        ExportRequest(model="m", labels=("no", "yes"), adapter=kind, **option)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"rank": 0}, "adapter.rank = 0"),
        ({"depth": 3}, "adapter.depth = 3 .*from 1 to 2"),
        ({"bottleneck": 64}, "adapter.bottleneck = 64"),
        ({"hidden_modes": (4, 4)}, "multiply to 32"),
        ({"labels": ()}, "at least 2 labels"),
        ({"adapter": "dense", "bottleneck": 64}, "adapter.bottleneck = 64"),
        ({"adapter": "lora", "rank": 17}, "adapter.rank = 17 .*from 1 to 16"),
        ({"adapter": "lora", "alpha": -1.0}, "adapter.alpha = -1.0"),
    ],
)
def test_what_does_not_fit_the_base_is_refused_when_planned(change: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        plan(**change)


def test_each_kind_is_planned_with_its_own_options() -> None:
    tt = plan(bottleneck=8, rank=2, sites=("mlp",)).inserted
    assert isinstance(tt, TTBottleneck)
    assert (tt.sites, tt.down.d_out, tt.down.rank) == (("mlp",), 8, 2)
    dense = plan(adapter="dense", bottleneck=8, depth=1)
    assert (dense.depth, dense.inserted) == (
        1,
        DenseBottleneck(sites=("attention", "mlp"), hidden=32, bottleneck=8),
    )
    lora = plan(adapter="lora", rank=4, alpha=16, targets=("query", "key", "value")).inserted
    assert isinstance(lora, Lora)
    assert [(t.name, t.d_out) for t in lora.targets] == [("query", 32), ("key", 16), ("value", 16)]
    assert (lora.rank, lora.scale) == (4, 4.0)
    assert plan(adapter="none").inserted == HeadOnly()


@pytest.mark.parametrize("kind", ["tt", "dense", "lora", "none"])
@pytest.mark.parametrize("head", ["label-names", "tt", "dense"])
def test_every_kind_has_the_same_heads(kind: Any, head: Any) -> None:
    assert plan(adapter=kind, head=head).head == plan(head=head).head


def test_a_decoder_for_next_tokens_has_no_head() -> None:
    assert plan(task="causal-lm", labels=(), bottleneck=8).head is None
