"""Graphs that hold their matrices as fp16 or int8 and compute them as float32 where they are used."""

from __future__ import annotations

import onnx_ir as ir
import torch
from torch import Tensor

from .quantise import Stored

__all__ = ["store"]

_LAST = "quantise.axis"  #: the initialiser that says -1


def store(model: ir.Model, stored: dict[str, Stored]) -> None:
    """Put what is stored in the place of each matrix of a graph; each use computes it again.

    So no float32 copy of int8 outlives the product it is for. Of embeddings only rows looked up are computed.
    """
    graph = model.graph
    for name in graph.initializers.keys() & stored.keys():
        weight, kept = graph.initializers[name], stored[name]
        codes = _initialiser(graph, f"{name}.codes", kept.codes)
        scale = None if kept.scale is None else _initialiser(graph, f"{name}.scale", kept.scale)
        for node, index in tuple(weight.uses()):
            if node.op_type == "Gather" and index == 0 and node.attributes.get_int("axis", 0) == 0:
                _replace_gather(graph, node, codes, scale)
            else:
                value = _value(codes, scale)
                graph.insert_before(node, value)
                node.replace_input_with(index, value.outputs[0])
        del graph.initializers[name]
    graph.sort()


def _initialiser(graph: ir.Graph, name: str, value: Tensor) -> ir.Value:
    tensor = ir.Tensor(value.numpy(), name=name)
    found = ir.Value(name=name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
    graph.register_initializer(found)
    return found


def _value(codes: ir.Value, scale: ir.Value | None) -> ir.Node:
    if scale is None:
        return ir.node("Cast", [codes], {"to": ir.DataType.FLOAT})
    return ir.node("DequantizeLinear", [codes, scale], {"axis": 0})


def _replace_gather(graph: ir.Graph, node: ir.Node, codes: ir.Value, scale: ir.Value | None) -> None:
    rows = ir.node("Gather", [codes, node.inputs[1]])
    value = ir.node("Cast", [rows.outputs[0]], {"to": ir.DataType.FLOAT})
    made = [rows, value]
    if scale is not None:
        axis = graph.initializers.get(_LAST) or _initialiser(graph, _LAST, torch.tensor([-1]))
        scales = ir.node("Gather", [scale, node.inputs[1]])
        column = ir.node("Unsqueeze", [scales.outputs[0], axis])
        made += [scales, column, ir.node("Mul", [value.outputs[0], column.outputs[0]])]
    graph.insert_before(node, made)
    node.outputs[0].replace_all_uses_with(made[-1].outputs[0])
    graph.remove(node, safe=True)
