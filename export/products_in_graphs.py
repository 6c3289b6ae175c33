"""Graphs that multiply by the frozen matrices of blocks in integers, as `integer_products` says."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor

from fedtt.errors import ConfigError

from .integer_products import LEAST, LEVELS

__all__ = ["write_products"]

_ZERO = 128  #: stands for 0, as kernels want unsigned rows
_RUNTIME = "com.microsoft"  #: ONNX Runtime's own operators

Constant = Callable[[str, Tensor], ir.Value]  #: name and value -> what a graph knows it by


def write_products(
    graph: ir.Graph, weight: ir.Value, codes: ir.Value, scale: ir.Value, constant: Constant
) -> None:
    """Put products in integers in the place of all that a graph multiplies by a matrix."""
    for node, transposed in tuple(_products(weight, transposed=False)):
        writer = _Writer(constant)
        x, _, *bias = node.inputs
        y = writer.forward(x, codes, scale) if transposed else writer.backward(x, codes, scale)
        for value in bias:
            y = writer.add("Add", y, value)
        graph.insert_before(node, writer.nodes)
        node.outputs[0].replace_all_uses_with(y)
        graph.remove(node, safe=True)
        graph.opset_imports[_RUNTIME] = 1


class _Writer:
    """The nodes of one product."""

    def __init__(self, constant: Constant) -> None:
        self.nodes: list[ir.Node] = []
        self._constant = constant
        self._one = constant("one", torch.tensor(1.0))
        self._zero = constant("zero", torch.tensor(_ZERO, dtype=torch.uint8))

    def forward(self, x: ir.Value | None, codes: ir.Value, scale: ir.Value) -> ir.Value:
        return self._product(x, self.add("Transpose", codes, perm=[1, 0]), scale)

    def backward(self, gradient: ir.Value | None, codes: ir.Value, scale: ir.Value) -> ir.Value:
        return self._product(self.add("Mul", gradient, scale), codes, self._one)

    def add(self, operator: str, *inputs: ir.Value | None, domain: str = "", **attributes: Any) -> ir.Value:
        self.nodes.append(ir.node(operator, inputs, attributes, domain=domain))
        return self.nodes[-1].outputs[0]

    def _product(self, x: ir.Value | None, matrix: ir.Value, columns: ir.Value) -> ir.Value:
        """ONNX Runtime makes its own operator of standard ones, too, but then scales a bias with the rows."""
        rounded, step = self._rounded(x)
        inputs = (rounded, matrix, self._one, columns, self._zero)
        return self.add("Mul", self.add("MatMulIntegerToFloat", *inputs, domain=_RUNTIME), step)

    def _rounded(self, x: ir.Value | None) -> tuple[ir.Value, ir.Value]:
        """x (T, N) as unsigned integers, and the steps (T, 1).

        Steps are computed as (T,): with a scalar beside it, each row of (T, 1) is a loop of its own.
        """
        last, least = (
            self._constant("last", torch.tensor([-1])),
            self._constant("least", torch.tensor([LEAST])),
        )
        lowest = self.add("Neg", self.add("ReduceMin", x, last, keepdims=0))
        largest = self.add("Max", self.add("Max", self.add("ReduceMax", x, last, keepdims=0), lowest), least)
        steps = self.add("Div", largest, self._constant("levels", torch.tensor(float(LEVELS))))
        zeros = self.add("Expand", self._zero, self.add("Shape", steps))
        return self.add("QuantizeLinear", x, steps, zeros, axis=0), self.add("Unsqueeze", steps, last)


def _products(value: ir.Value, *, transposed: bool) -> Iterator[tuple[ir.Node, bool]]:
    """The nodes that multiply by a matrix, and whether by its transpose; ConfigError where others use it."""
    for node, index in value.uses():
        if node.op_type == "Transpose":
            yield from _products(node.outputs[0], transposed=not transposed)
        elif node.op_type in ("MatMul", "Gemm") and index == 1:
            yield node, transposed != bool(node.attributes.get_int("transB", 0))
        else:
            use = f"{value.name} is input {index} of {node.op_type}, which is no product by it"
            raise ConfigError("products", "int8", f"fp32 for this model: {use}")
