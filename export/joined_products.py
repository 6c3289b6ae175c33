"""Backward products in integers that follow one another through a slope alone: two passes less between."""

from __future__ import annotations

from typing import NamedTuple

import onnx_ir as ir

__all__ = ["join_products"]

_PRODUCT, _COLUMNS = "MatMulIntegerToFloat", 3  #: its input that holds the columns' scales


def join_products(graph: ir.Graph) -> None:
    """Round q (Q diag(s)) d where the next product would round a (q Q) d s, d being an activation's slope.

    The columns' scales s join the product before, and its rows' steps a, which rounding takes out of a row,
    those of the next.
    """
    for node in tuple(graph):
        if node.op_type != _PRODUCT or (found := _joint(node)) is None:
            continue
        steps = ir.node("Mul", [found.next_stepped.inputs[1], found.stepped.inputs[1]])
        graph.insert_before(found.next_stepped, steps)
        found.next_stepped.replace_input_with(1, steps.outputs[0])
        found.product.replace_input_with(_COLUMNS, found.scaled.inputs[1])
        _leave_out(graph, found.stepped)
        _leave_out(graph, found.scaled)


def _leave_out(graph: ir.Graph, node: ir.Node) -> None:
    """Let what reads an operator read its first input."""
    if (first := node.inputs[0]) is not None:
        node.outputs[0].replace_all_uses_with(first)
        graph.remove(node, safe=True)


class _Joint(NamedTuple):
    """In their order, with a slope and the rounding between the second and the fourth."""

    product: ir.Node
    stepped: ir.Node  #: its rows times their steps
    scaled: ir.Node  #: the columns that are rounded next, times their scales
    next_stepped: ir.Node  #: the rows of the next product, times their steps


def _joint(following: ir.Node) -> _Joint | None:
    rounded = _maker(following.inputs[0], "QuantizeLinear")
    scaled = rounded and _maker(rounded.inputs[0], "Mul")
    users = sorted(node.op_type for node in scaled.outputs[0].consumers()) if scaled else []
    if scaled is None or users != ["QuantizeLinear", "ReduceMax", "ReduceMin"]:
        return None
    sloped = _maker(scaled.inputs[0], "Mul", alone=True)
    for value in sloped.inputs if sloped else ():
        stepped = _maker(value, "Mul", alone=True)
        product = stepped and _maker(stepped.inputs[0], _PRODUCT, alone=True)
        if stepped and product and product.inputs[_COLUMNS] is following.inputs[_COLUMNS]:  # both backward
            return _Joint(product, stepped, scaled, following.outputs[0].consumers()[0])
    return None


def _maker(value: ir.Value | None, operator: str, *, alone: bool = False) -> ir.Node | None:
    """The operator that a value comes from, behind reshapes; with `alone` where nobody else reads it."""
    node = value.producer() if value is not None else None
    if value is None or node is None or (alone and len(value.uses()) > 1):
        return None
    if node.op_type == "Reshape":
        return _maker(node.inputs[0], operator, alone=alone)
    return node if node.op_type == operator else None
