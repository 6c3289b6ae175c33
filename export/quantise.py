"""A smaller base: its matrices stored as fp16 or int8, computed with as float32.

Weights are rounded in the torch model first, so that graphs, label rows and every comparison are of the same
rounded base. int8 is symmetric with a scale a row: of an embedding's token, of a layer's output channel.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir
import torch
from torch import Tensor, nn

from fedtt.errors import ConfigError
from fedtt.manifest import Precision

__all__ = ["Stored", "quantise", "store"]

_LEVELS = 127  #: of each sign
_LAST = "quantise.axis"  #: the initialiser that says -1


@dataclass(frozen=True)
class Stored:
    """One matrix (M, N) as it is stored: fp16 numbers, or int8 codes with a scale (M,) for each row."""

    codes: Tensor
    scale: Tensor | None = None

    def value(self) -> Tensor:
        """The matrix in float32, to the bit what the graphs compute."""
        codes = self.codes.to(torch.float32)
        return codes if self.scale is None else codes * self.scale[:, None]


def quantise(model: nn.Module, precision: Precision) -> dict[str, Stored]:
    """Round every matrix of a model in place; what is stored of each, by the parameter's name.

    Raises ConfigError for a weight that the precision cannot hold.
    """
    if precision == "fp32":
        return {}
    matrices = {name: weight for name, weight in model.named_parameters() if weight.dim() == 2}
    stored = {name: _stored(name, weight.detach(), precision) for name, weight in matrices.items()}
    with torch.no_grad():
        for name, weight in matrices.items():
            weight.copy_(stored[name].value())
    return stored


def _stored(name: str, weight: Tensor, precision: Precision) -> Stored:
    largest = weight.abs().amax(1)
    limit = torch.finfo(torch.float16 if precision == "fp16" else torch.float32).max
    if not bool((largest <= limit).all()):
        raise ConfigError(
            "base", precision, f"one that can hold {name}, whose largest weight is {largest.max():g}"
        )
    if precision == "fp16":
        return Stored(weight.to(torch.float16))
    scale = torch.where(largest > 0, largest / _LEVELS, torch.ones_like(largest))
    return Stored(torch.round(weight / scale[:, None]).clamp(-_LEVELS, _LEVELS).to(torch.int8), scale)


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
