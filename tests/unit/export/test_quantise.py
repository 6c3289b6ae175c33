"""Rounding of a base's matrices."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from export.quantise import quantise
from fedtt.errors import ConfigError
from fedtt.manifest import Precision


def _layer(weight: torch.Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0])
    layer.weight = nn.Parameter(weight)
    return layer.requires_grad_(False)


@given(seed=st.integers(0, 2**32 - 1), spread=st.floats(1e-3, 1e3))
def test_int8_moves_a_weight_by_half_a_step_of_its_row(seed: int, spread: float) -> None:
    weight = torch.randn(5, 7, generator=torch.Generator().manual_seed(seed)) * spread
    layer = _layer(weight.clone())
    stored = quantise(layer, "int8")
    step = weight.abs().amax(1, keepdim=True) / 127
    assert bool(((layer.weight - weight).abs() <= step * 0.501).all())
    assert torch.equal(stored["weight"].value(), layer.weight)


def test_a_row_of_zeros_stays_one() -> None:
    layer = _layer(torch.zeros(2, 3))
    quantise(layer, "int8")
    assert torch.equal(layer.weight, torch.zeros(2, 3))


def test_vectors_stay_as_they_are() -> None:
    layer = _layer(torch.ones(2, 3))
    bias = layer.bias.clone()
    assert quantise(layer, "int8").keys() == {"weight"}
    assert torch.equal(layer.bias, bias)


def test_fp32_rounds_nothing() -> None:
    weight = torch.full((1, 1), 1 / 3)
    layer = _layer(weight.clone())
    assert quantise(layer, "fp32") == {}
    assert torch.equal(layer.weight, weight)


@pytest.mark.parametrize(
    ("precision", "weight"), [("fp16", 1e5), ("int8", float("inf")), ("int8", float("nan"))]
)
def test_weights_that_do_not_fit_are_refused_by_name(precision: Precision, weight: float) -> None:
    with pytest.raises(ConfigError, match=f"base = '{precision}'.*can hold weight, whose largest weight is"):
        quantise(_layer(torch.full((1, 1), weight)), precision)
