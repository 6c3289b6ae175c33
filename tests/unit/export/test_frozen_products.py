"""ONNX Runtime multiplies by frozen matrices as they lie in the file, and computes those in int8 singly."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import onnx_ir as ir
import onnxruntime
import torch
from torch import Tensor, nn

from export.quantise import Stored, quantise
from export.stored_in_graphs import store
from export.to_onnx import convert, write_graphs
from export.trace import trace

AXES = {"x": ("rows",), "shift": ()}
PRODUCTS = {"Gemm", "MatMul", "FusedMatMul"}


class Blocks(nn.Module):
    """x (N, 8), shift (8,) -> the gradient in shift of a loss over two blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(4)).requires_grad_(False)

    def forward(self, x: Tensor, shift: Tensor) -> Tensor:
        def loss(shift: Tensor) -> Tensor:
            first, second, third, last = self.layers
            y = x + shift
            y = second(torch.tanh(first(y))) * y
            y = last(torch.tanh(third(y))) * y
            return torch.sum(y**2)

        gradient: Tensor = torch.func.grad(loss)(shift)
        return gradient


def ran(blocks: Blocks, stored: dict[str, Stored], directory: Path) -> tuple[list[str], list[str]]:
    """The operators of the file, and those that ran, in their order; what came out is torch's."""
    inputs = {"x": torch.randn(5, 8), "shift": torch.randn(8)}
    graph = convert(
        trace(blocks, inputs, AXES), list(inputs), dict(blocks.named_parameters()), {"y": ()}, AXES
    )
    store(graph, stored)
    write_graphs({"graph.onnx": graph}, "graph.bin", directory)
    options = onnxruntime.SessionOptions()
    options.enable_profiling, options.profile_file_prefix = True, str(directory / "profile")
    session = onnxruntime.InferenceSession(
        directory / "graph.onnx",
        options,
        providers=["CPUExecutionProvider"],
        disabled_optimizers=["ConstantFolding"],
    )
    (found,) = session.run(["y"], {name: value.numpy() for name, value in inputs.items()})
    torch.testing.assert_close(torch.from_numpy(found), blocks(*inputs.values()), atol=1e-4, rtol=1e-4)
    events = json.loads(Path(session.end_profiling()).read_text())
    order = [event["args"]["op_name"] for event in events if event["cat"] == "Node"]
    return [node.op_type for node in ir.load(directory / "graph.onnx").graph], order


def test_no_frozen_matrix_is_turned(tmp_path: Path) -> None:
    torch.manual_seed(0)
    written, order = ran(Blocks(), {}, tmp_path)
    assert "Transpose" not in written
    assert sum(operator in PRODUCTS for operator in order) == 8  # of 4 layers, forward and back


def test_a_matrix_in_int8_is_computed_right_before_each_product_by_it(tmp_path: Path) -> None:
    torch.manual_seed(0)
    blocks = Blocks()
    _, order = ran(blocks, quantise(blocks, "int8"), tmp_path)
    next_to = [after for before, after in pairwise(order) if before == "DequantizeLinear"]
    assert len(next_to) == 8
    assert set(next_to) <= PRODUCTS
