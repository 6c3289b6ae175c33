"""Graphs that hold matrices as fp16 or int8, and compute them where they are used or multiply integers."""

from __future__ import annotations

from functools import partial

import onnx_ir as ir
import torch
from onnx_ir.passes import common as passes
from torch import Tensor

from .joined_products import join_products
from .products_in_graphs import write_products
from .quantise import Stored

__all__ = ["store"]


def store(model: ir.Model, stored: dict[str, Stored]) -> None:
    """Put what is stored in the place of each matrix of a graph; each use computes it again.

    So no float32 copy of int8 outlives the product it is for. In the file the nodes that compute copies stand
    before all else: ONNX Runtime orders nodes depth first, those that stand later before the others, and so
    computes each right before its use. Of embeddings only rows looked up are computed. Where integers are
    multiplied there is no copy.
    """
    graph = model.graph
    for name in graph.initializers.keys() & stored.keys():
        weight, kept = graph.initializers[name], stored[name]
        codes = _initialiser(graph, f"{name}.codes", kept.codes)
        scale = None if kept.scale is None else _initialiser(graph, f"{name}.scale", kept.scale)
        if kept.multiplied and scale is not None:
            write_products(graph, weight, codes, scale, partial(_constant, graph))
        for node, index in tuple(weight.uses()):
            if node.op_type == "Gather" and index == 0 and node.attributes.get_int("axis", 0) == 0:
                _replace_gather(graph, node, codes, scale)
            else:
                value = _value(codes, scale)
                graph.insert_before(graph[0], value)
                node.replace_input_with(index, value.outputs[0])
        del graph.initializers[name]
    graph.sort()
    if any(kept.multiplied for kept in stored.values()):
        passes.RemoveUnusedNodesPass()(model)
        passes.CommonSubexpressionEliminationPass()(model)  # one value of several products is rounded once
        join_products(graph)


def _initialiser(graph: ir.Graph, name: str, value: Tensor) -> ir.Value:
    tensor = ir.Tensor(value.numpy(), name=name)
    found = ir.Value(name=name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
    graph.register_initializer(found)
    return found


def _constant(graph: ir.Graph, name: str, value: Tensor) -> ir.Value:
    """The initialiser of this name, made where there is none."""
    name = f"quantise.{name}"
    return graph.initializers.get(name) or _initialiser(graph, name, value)


def _value(codes: ir.Value, scale: ir.Value | None) -> ir.Node:
    if scale is None:
        return ir.node("Cast", [codes], {"to": ir.DataType.FLOAT})
    return ir.node("DequantizeLinear", [codes, scale], {"axis": 0})


def _replace_gather(graph: ir.Graph, node: ir.Node, codes: ir.Value, scale: ir.Value | None) -> None:
    rows = ir.node("Gather", [codes, node.inputs[1]])
    value = ir.node("Cast", [rows.outputs[0]], {"to": ir.DataType.FLOAT})
    made = [rows, value]
    if scale is not None:
        axis = _constant(graph, "last", torch.tensor([-1]))
        scales = ir.node("Gather", [scale, node.inputs[1]])
        column = ir.node("Unsqueeze", [scales.outputs[0], axis])
        made += [scales, column, ir.node("Mul", [value.outputs[0], column.outputs[0]])]
    graph.insert_before(node, made)
    node.outputs[0].replace_all_uses_with(made[-1].outputs[0])
    graph.remove(node, safe=True)
