"""What is written otherwise gives what torch gives, and is there: torch may come to decompose otherwise."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import onnx_ir as ir
import onnxruntime
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from export.gradients import layer_norm_backward
from export.to_onnx import convert, write_graphs
from export.trace import trace

SCALE = 0.3


class Slope(nn.Module):
    """x (N,) -> the slope of gelu there."""

    def forward(self, x: Tensor) -> Tensor:
        slope: Tensor = torch.func.grad(lambda x: F.gelu(x).sum())(x)
        return slope


class Attention(nn.Module):
    """x (B, S, 8) -> the gradient of a loss of y = x + attention(x) M, with M (4, 8) thin, in x and M."""

    def forward(self, x: Tensor, thin: Tensor) -> tuple[Tensor, Tensor]:
        def loss(x: Tensor, thin: Tensor) -> Tensor:
            heads = x.view(*x.shape[:2], 2, 4).transpose(1, 2)
            weights = torch.softmax(torch.matmul(heads, heads.transpose(2, 3)) * SCALE, -1)
            mixed = torch.matmul(weights, heads).transpose(1, 2).reshape(*x.shape)
            narrow = F.linear(mixed, thin)
            return ((x + F.linear(narrow, thin.t())) ** 3).sum()

        found: tuple[Tensor, Tensor] = torch.func.grad(loss, (0, 1))(x, thin)
        return found


def ran(
    module: nn.Module, inputs: dict[str, Tensor], axes: dict[str, tuple[str, ...]], directory: Path
) -> tuple[list[Tensor], list[ir.Node]]:
    """What the exported graph gives, and the nodes that ONNX Runtime made of it."""
    given = module(*inputs.values())
    outputs = {f"y{i}": axes["x"] for i in range(1 if isinstance(given, Tensor) else len(given))}
    graph = convert(trace(module, inputs, axes), list(inputs), {}, outputs, axes)
    write_graphs({"graph.onnx": graph}, "graph.bin", directory)
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(directory / "loaded.onnx")
    options.log_severity_level = 3  # it warns of files that only fit this machine
    session = onnxruntime.InferenceSession(
        directory / "graph.onnx", options, providers=["CPUExecutionProvider"]
    )
    found = session.run(list(outputs), {name: value.numpy() for name, value in inputs.items()})
    return [torch.from_numpy(value) for value in found], list(ir.load(directory / "loaded.onnx").graph)


def test_the_slope_of_gelu_is_exact_from_zero_to_where_exp_overflows(tmp_path: Path) -> None:
    x = torch.cat([torch.linspace(-6, 6, 101), torch.tensor([0.0, 1e-20, -1e-20, 13.5, -13.5, 1e4, -1e4])])
    (found,), nodes = ran(Slope(), {"x": x}, {"x": ("rows",)}, tmp_path)
    torch.testing.assert_close(found.double(), Slope()(x.double()), atol=3e-7, rtol=0)
    used = Counter(node.op_type for node in nodes)
    assert (used["HardSigmoid"], used["Erf"], used["Exp"], used["Div"]) == (1, 1, 1, 1)


def test_attention_scales_products_and_adds_within_them(tmp_path: Path) -> None:
    torch.manual_seed(0)
    inputs = {"x": torch.randn(5, 7, 8), "thin": torch.randn(4, 8)}
    axes: dict[str, tuple[str, ...]] = {"x": ("batch", "tokens"), "thin": ()}
    found, nodes = ran(Attention(), inputs, axes, tmp_path)
    for got, wanted in zip(found, Attention()(*inputs.values()), strict=True):
        torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-5)
    scaled = [node for node in nodes if abs(node.attributes.get_float("alpha", 1.0) - SCALE) < 1e-6]
    assert len(scaled) == 2  # scores, and the gradient of softmax
    assert sum(node.op_type == "Gemm" and len(node.inputs) == 3 for node in nodes) == 1


def test_the_gradient_of_a_layer_norm_is_torchs() -> None:
    torch.manual_seed(0)
    x, gradient, weight = 3 + torch.randn(4, 5, 16), torch.randn(4, 5, 16), torch.randn(16)
    _, mean, rstd = torch.native_layer_norm(x, [16], weight, None, 1e-12)
    for wanted in ([True, False, False], [True, True, True]):
        arguments = (gradient, x, [16], mean, rstd, weight, weight)
        expected = torch.ops.aten.native_layer_norm_backward(*arguments, wanted)
        found = layer_norm_backward(*arguments, wanted)
        for got, part in zip(found, expected, strict=True):
            assert (got is None) == (part is None)
            if got is not None:
                torch.testing.assert_close(got, part)
