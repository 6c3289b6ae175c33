"""From an exported step to ExecuTorch programs that share one file of weights.

XNNPACK takes the products with frozen weights, and what ExecuTorch's own kernels are slow at. It gets each
weight as an input and not as a constant of its own: then forward and backward read one copy, in place, from
the mapped file, where a constant would be packed twice for each. All else runs in ExecuTorch's own kernels.
"""

from __future__ import annotations

import contextlib
import logging
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from torch.export import ExportedProgram
from torch.fx import Node

from .quantise import Stored
from .trace import decomposed_once

with warnings.catch_warnings():  # importing it says much about torch's and its own deprecations
    warnings.simplefilter("ignore")
    from executorch.backends.xnnpack.xnnpack_preprocess import XnnpackBackend
    from executorch.exir import EdgeCompileConfig, ExecutorchBackendConfig, to_edge
    from executorch.exir._serialize._cord import Cord
    from executorch.exir._serialize._named_data_store import NamedDataStore
    from executorch.exir._serialize.data_serializer import DataPayload
    from executorch.exir.backend.compile_spec_schema import CompileSpec
    from executorch.exir.backend.partitioner import DelegationSpec, Partitioner, PartitionResult
    from executorch.exir.dialects._ops import ops
    from executorch.extension.flat_tensor.serialize.serialize import FlatTensorSerializer

    from .executorch_passes import FROZEN, digest, frozen_names, is_frozen, shape_of, simplify, store

__all__ = ["write_programs"]

_ATEN = torch.ops.aten
_TAG = "weights"
#: Makes the back end take one pass, that to `linear`, over each operator, and not all its 17.
_FEW_PASSES = CompileSpec("dqlinear_partitioner", b"")


def write_programs(
    programs: Iterable[tuple[str, ExportedProgram]],
    weights: str,
    directory: Path,
    stored: Mapping[int, Stored] | None = None,
) -> None:
    """Lower each program to the file of its name, and write once, to `weights`, every tensor of all.

    stored: what is kept of a matrix in its place, by its address.
    """
    data_store, serializer = NamedDataStore(), FlatTensorSerializer()
    with _quiet():
        for name, program in programs:
            code, data = _lower(program, stored or {})
            (directory / name).write_bytes(code)
            data_store.merge_named_data_store(serializer.deserialize_to_named_data_store_output(data, _TAG))
        merged = data_store.get_named_data_store_output()
        payload = DataPayload(buffers=merged.buffers, named_data=merged.external_data[_TAG])
        (directory / weights).write_bytes(bytes(serializer.serialize(payload)))


def _lower(program: ExportedProgram, stored: Mapping[int, Stored]) -> tuple[bytes, Cord]:
    """The program and its tensors, each named by what it holds, so that other weights are never mistaken."""
    _name_by_content(program)
    simplify(program.graph, frozen_names(program))
    store(program, stored)
    program.graph_module.recompile()
    config = EdgeCompileConfig(_check_ir_validity=False, preserve_ops=[_ATEN.linear.default])
    with decomposed_once(program):
        edge = to_edge(program, compile_config=config).to_backend(_SingleOperators())
    lowered = edge.to_executorch(ExecutorchBackendConfig(external_constants=lambda node: _TAG))
    with tempfile.TemporaryDirectory() as directory:
        lowered.write_tensor_data_to_file(directory)
        data = (Path(directory) / f"{_TAG}.ptd").read_bytes()
    return lowered.buffer, Cord(data)


def _name_by_content(program: ExportedProgram) -> None:
    """Give each constant the name of its bytes, and let equal ones be one."""
    nodes = {node.name: node for node in program.graph.nodes if node.op == "placeholder"}
    first: dict[str, Node] = {}
    for spec in program.graph_signature.input_specs:
        if spec.kind not in FROZEN or spec.target is None:
            continue
        held = program.state_dict if spec.target in program.state_dict else program.constants
        value = held.pop(spec.target)
        name, node = digest(value), nodes[spec.arg.name]
        if name in first:
            node.replace_all_uses_with(first[name])
            name = f"{name}_{len(first)}_{node.name}"
        else:
            first[name] = node
        held[name] = value
        spec.target = name


# lowering


class _SingleOperators(Partitioner):  # type: ignore[misc, unused-ignore]
    """Marks for XNNPACK, one by one, products with a frozen weight and what else it is much faster at.

    ExecuTorch's kernels for those take each number by itself. XNNPACK's own partitioner looks through the
    whole graph at each node, which takes minutes here.
    """

    _PRODUCTS = (ops.edge.aten.mm.default, ops.edge.aten.linear.default)
    _FASTER = (
        ops.edge.aten.exp.default,
        ops.edge.aten.gelu.default,
        ops.edge.aten.permute_copy.default,
        ops.edge.aten._softmax.default,
    )

    def partition(self, exported_program: ExportedProgram) -> PartitionResult:
        frozen = frozen_names(exported_program)
        tags: dict[str, DelegationSpec] = {}
        for index, node in enumerate(exported_program.graph.nodes):
            if self._taken(node, frozen):
                tag = node.meta["delegation_tag"] = f"operator{index}"
                tags[tag] = DelegationSpec(XnnpackBackend.__name__, [_FEW_PASSES])
        return PartitionResult(tagged_exported_program=exported_program, partition_tags=tags)

    def _taken(self, node: Node, frozen: set[str]) -> bool:
        if node.target in self._PRODUCTS:
            return is_frozen(node.args[1], frozen)
        if node.target not in self._FASTER or node.kwargs or not _grows(node):
            return False
        return node.target is not self._FASTER[-1] or node.args[1] in (-1, len(shape_of(node)) - 1)


def _grows(node: Node) -> bool:
    """Whether its size is the batch's; others are too small to be worth a call."""
    return not all(isinstance(size, int) for size in shape_of(node))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence what lowering says about its own deprecations and the passes it takes."""
    level = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
