"""Products with the frozen matrices of blocks in integers, in ExecuTorch: `integer_products`, `by_range`.

XNNPACK's operator wants rows that it rounds in passing, and as a constant a matrix with a scale for each
number that comes out. Forward that is a layer as it is stored. Backward the same bytes are read the other
way, with scales of one, as their own have joined the gradient. `write_products` writes the form in which
ExecuTorch knows such products; `joined_products` finds them in what becomes of it, and says what is one call.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch
from executorch.backends.xnnpack.utils.quant_utils import tag_as_implicit_q_dq
from executorch.exir.dialects._ops import ops
from torch import Tensor
from torch.ao.quantization.fx import _decomposed  # noqa: F401  # makes torch know the operators
from torch.fx import Graph, Node

from fedtt.errors import ConfigError

from .quantise import Stored

__all__ = ["joined_products", "write_products"]

_ATEN, _QUANTISED = torch.ops.aten, torch.ops.quantized_decomposed
_INT8 = (-128, 127, torch.int8)

_FLOAT_ROWS = ops.edge.quantized_decomposed.dequantize_per_token.default
_ROUNDING = (
    _FLOAT_ROWS,
    ops.edge.quantized_decomposed.quantize_per_token.default,
    ops.edge.quantized_decomposed.choose_qparams_per_token_asymmetric.default,
    ops.edge.quantized_decomposed.dequantize_per_channel.default,
)
#: Where each has its rows among its arguments.
_PRODUCTS = {ops.edge.aten.linear.default: 0, ops.edge.aten.addmm.default: 1}

Constant = Callable[[Tensor], Node]  #: value -> what the graph knows it by


# written


def write_products(graph: Graph, weight: Node, kept: Stored, constant: Constant) -> None:
    """Put products in integers in the place of all that a graph multiplies by a matrix.

    Raises ConfigError where anything else is made of it.
    """
    if kept.scale is None:
        raise ConfigError("products", "int8", f"an int8 base; {weight} has no scales")
    codes, scale = constant(kept.codes), constant(kept.scale)
    for node in list(weight.users):
        if node.target not in (_ATEN.linear.default, _ATEN.mm.default) or node.args[1] is not weight:
            use = f"{weight} goes into {node.target}, which is no product by it"
            raise ConfigError("products", "int8", f"fp32 for this model: {use}")
        x, _, *bias = node.args
        with graph.inserting_before(node):
            if node.target is _ATEN.linear.default:
                rows = _rounded(graph, x)
                matrix = _matrix(graph, codes, scale, constant, axis=0)
                new = _made(graph, _ATEN.linear.default, rows, matrix, *bias)
            else:
                rows = _rounded(graph, _made(graph, _ATEN.mul.Tensor, x, scale))
                columns = kept.codes.shape[1]
                matrix = _matrix(graph, codes, constant(torch.ones(columns)), constant, axis=1)
                # XNNPACK's `mm` takes no such matrix; its `addmm` does
                new = _made(graph, _ATEN.addmm.default, constant(torch.zeros(columns)), rows, matrix)
        node.replace_all_uses_with(new)
        graph.erase_node(node)


def _rounded(graph: Graph, x: Any) -> Node:
    """The rows of x in integers; XNNPACK sees by the two operators after it that it is to round them."""
    choice = _made(graph, _QUANTISED.choose_qparams_per_token_asymmetric.default, x, torch.int8)
    steps, zeros = (_made(graph, operator.getitem, choice, i) for i in (0, 1))
    whole = _made(graph, _QUANTISED.quantize_per_token.default, x, steps, zeros, *_INT8)
    return _made(graph, _QUANTISED.dequantize_per_token.default, whole, steps, zeros, *_INT8, torch.float32)


def _matrix(graph: Graph, codes: Node, scale: Node, constant: Constant, axis: int) -> Node:
    zeros = constant(torch.zeros(scale.meta["val"].shape, dtype=torch.int64))
    return _made(graph, _QUANTISED.dequantize_per_channel.default, codes, scale, zeros, axis, *_INT8)


def _made(graph: Graph, target: Any, *args: Any) -> Node:
    node = graph.call_function(target, args)
    node.meta["val"] = target(*(arg.meta["val"] if isinstance(arg, Node) else arg for arg in args))
    return node


# found again


def joined_products(graph: Graph, frozen: Collection[str]) -> Iterator[set[Node]]:
    """The nodes of what XNNPACK is to compute in one call: all products of the same rows, and what they read.

    frozen: names of constants.
    """
    found: dict[Node, set[Node]] = {}
    for node in graph.nodes:
        if node.target in _PRODUCTS and (rows := node.args[_PRODUCTS[node.target]]).target is _FLOAT_ROWS:
            tag_as_implicit_q_dq(rows)
            found.setdefault(rows, set()).update(_read(node, frozen))
    yield from found.values()


def _read(node: Node, frozen: Collection[str]) -> Iterator[Node]:
    """A node, and before it roundings and constants."""
    yield node
    for source in node.all_input_nodes:
        if source.name in frozen:
            yield source
        elif source.target is operator.getitem or source.target in _ROUNDING:
            yield from _read(source, frozen)
