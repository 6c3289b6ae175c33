from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, export
from torch.nn import functional as F

from export.trace import FlatProducts, decomposed_once, trace


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


class _Gate(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.silu(x)


@pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")  # torch's, of itself
def test_what_was_traced_is_not_decomposed_again_and_what_holds_more_is() -> None:
    """By a table that lists only what our own tracing takes apart."""
    table = {torch.ops.aten.silu.default: lambda x: x * torch.sigmoid(x)}
    traced = trace(_Gate(), {"x": torch.randn(4, 3)}, {"x": ("batch",)})
    with decomposed_once(traced):
        assert traced.run_decompositions(dict(table)) is traced
    plain = export(_Gate(), (torch.randn(4, 3),), dynamic_shapes=({0: Dim("batch")},))
    with decomposed_once(plain):
        taken_apart = plain.run_decompositions(dict(table))
    assert torch.ops.aten.silu.default not in {node.target for node in taken_apart.graph.nodes}
    assert torch.ops.aten.silu.default in {node.target for node in plain.graph.nodes}
