from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from export.trace import FlatProducts


@pytest.mark.parametrize(
    ("left", "right"),
    [
        ((4, 3), (3, 5)),
        ((2, 4, 3), (3, 5)),
        ((2, 4, 3), (2, 3, 5)),
        ((1, 4, 3), (2, 3, 5)),
        ((2, 6, 4, 3), (2, 6, 3, 5)),
        ((2, 6, 4, 3), (2, 1, 3, 5)),
        ((3,), (3,)),
    ],
)
def test_flat_products_multiply_as_matmul_does(left: tuple[int, ...], right: tuple[int, ...]) -> None:
    a, b = torch.randn(left), torch.randn(right)
    expected = a @ b
    with FlatProducts():
        torch.testing.assert_close(a @ b, expected)
        torch.testing.assert_close(torch.matmul(a, b), expected)


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("lead", [(), (2,), (2, 4)])
def test_flat_products_apply_linear_layers_as_they_are(lead: tuple[int, ...], with_bias: bool) -> None:
    x, weight = torch.randn(*lead, 3), torch.randn(5, 3)
    bias = torch.randn(5) if with_bias else None
    expected = F.linear(x, weight, bias)
    with FlatProducts():
        torch.testing.assert_close(F.linear(x, weight, bias=bias), expected)
