"""From an exported training step to two ONNX graphs that share one file of weights."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch
from onnx_ir.passes import common as passes
from torch import Tensor
from torch.export import ExportedProgram

from .onnx_passes import simplify
from .trace import AXES, decomposed_once

__all__ = ["OPSET", "STEP_OUTPUTS", "convert", "part_of", "share_weights", "write_graphs"]

OPSET = 20  #: the first with Gelu as an operator, so that runtimes have a kernel for it

STEP_OUTPUTS = {"loss": (), "grad": (), "logits": ("batch", "tokens")}

_INLINE_BYTES = 256  #: tensors up to this size stay in the graph


def convert(
    program: ExportedProgram,
    inputs: Sequence[str],
    weights: Mapping[str, Tensor],
    outputs: Mapping[str, tuple[str, ...]] = STEP_OUTPUTS,
    axes: Mapping[str, tuple[str, ...]] = AXES,
) -> ir.Model:
    """One ONNX model of a traced module; of a `TrainingStep` where its outputs are not named.

    inputs: names of its inputs. weights: the base's, whose names the initialisers take. outputs: names and
    their dynamic sizes; axes: those of the inputs. The optimiser of the exporter is left out: it triples
    the time, and runtimes optimise when they load.
    """
    with _quiet(), decomposed_once(program):
        converted = torch.onnx.export(
            program,
            dynamo=True,
            opset_version=OPSET,
            optimize=False,
            verbose=False,
            input_names=inputs,
            output_names=list(outputs),
        )
    if converted is None:
        raise RuntimeError("torch.onnx.export(dynamo=True) returned no program")
    model = converted.model
    _name_weights(model.graph, {weight.data_ptr(): name for name, weight in weights.items()})
    simplify(model)
    _run(model, passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0))
    _run(model, passes.IdentityEliminationPass(), passes.DeduplicateInitializersPass())
    _run(model, passes.CommonSubexpressionEliminationPass())
    _forget_origins(model, {**axes, **outputs})
    return model


def write_graphs(graphs: Mapping[str, ir.Model], weights: str, directory: Path) -> None:
    """Write each graph under its name, and once, to the file `weights`, every larger tensor of all."""
    large = {
        name: value.const_value
        for model in graphs.values()
        for name, value in model.graph.initializers.items()
        if value.const_value is not None and value.const_value.nbytes > _INLINE_BYTES
    }
    external = ir.external_data.convert_tensors_to_external(list(large.values()), directory, weights)
    stored = dict(zip(large, external, strict=True))
    for file, model in graphs.items():
        for name in model.graph.initializers.keys() & stored.keys():
            model.graph.initializers[name].const_value = stored[name]
        ir.save(model, directory / file)


def share_weights(graphs: Mapping[str, ir.Model], source: Path, directory: Path) -> None:
    """Write each graph under its name, to be run with the files of weights beside the graph `source`.

    What a graph holds beside the weights of `source` stays in the graph. Links to the files would not do:
    onnx refuses them as a way to read what lies elsewhere.
    """
    held = {name: value.const_value for name, value in ir.load(source).graph.initializers.items()}
    shared = {name: tensor for name, tensor in held.items() if isinstance(tensor, ir.ExternalTensor)}
    for name, model in graphs.items():
        for key in model.graph.initializers.keys() & shared.keys():
            value = model.graph.initializers[key]
            if _is_same(value.const_value, shared[key]):
                value.const_value = shared[key]
        ir.save(model, directory / name)


def _is_same(mine: ir.TensorProtocol | None, other: ir.ExternalTensor) -> bool:
    """Whether two tensors are one up to rounding: rows of labels were computed on another machine."""
    return (
        mine is not None
        and (mine.dtype, mine.shape) == (other.dtype, other.shape)
        and np.allclose(mine.numpy(), other.numpy(), rtol=1e-4, atol=1e-6)
    )


def part_of(model: ir.Model, *outputs: str) -> ir.Model:
    """A copy that gives these outputs, without what only others need; labels go with the loss."""
    part = model.clone()
    graph = part.graph
    graph.outputs[:] = [value for value in graph.outputs if value.name in outputs]
    if "loss" not in outputs:
        _drop_labels(graph)
    _run(part, passes.RemoveUnusedNodesPass())
    return part


def _drop_labels(graph: ir.Graph) -> None:
    """Read the batch's size, which tracing may have read from the labels, from the ids."""
    inputs = {value.name: value for value in graph.inputs}
    if labels := inputs.get("labels"):
        for node, index in tuple(labels.uses()):
            if node.op_type == "Shape":
                node.replace_input_with(index, inputs["ids"])
        graph.inputs.remove(labels)


def _name_weights(graph: ir.Graph, names: Mapping[int, str]) -> None:
    for value in list(graph.initializers.values()):
        raw = getattr(value.const_value, "raw", None)
        if isinstance(raw, Tensor) and raw.data_ptr() in names:
            value.name = names[raw.data_ptr()]


def _forget_origins(model: ir.Model, axes: Mapping[str, tuple[str, ...]]) -> None:
    """Drop notes of where nodes came from: they hold paths, and would differ from machine to machine."""
    _run(model, passes.ClearMetadataAndDocStringPass())
    graph = model.graph
    model.metadata_props.clear()
    graph.metadata_props.clear()
    for value in (*graph.inputs, *graph.initializers.values(), *graph.outputs):
        value.metadata_props.clear()
    for value in (*graph.inputs, *graph.outputs):
        named, sizes = axes[value.name or ""], enumerate(value.shape or ())
        value.shape = ir.Shape(size if isinstance(size, int) else named[i] for i, size in sizes)
    for node in graph:
        for value in node.outputs:
            value.metadata_props.clear()
            if not value.is_graph_output():
                value.shape = value.type = None


def _run(model: ir.Model, *steps: ir.passes.InPlacePass) -> None:
    for step in steps:
        step(model)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence what the exporter says about packages that are not needed and its own deprecations."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=FutureWarning, message=".*LeafSpec.*")
            yield
    finally:
        logger.setLevel(level)
