"""From an exported step to ExecuTorch programs that share one file of weights.

XNNPACK takes the products with frozen weights, and those alone. It gets each weight as an input and not as a
constant of its own: then forward and backward read one copy, in place, from the mapped file, where a constant
would be packed twice over for each. Everything else runs in ExecuTorch's own kernels.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import tempfile
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.fx import Graph, Node

with warnings.catch_warnings():  # importing it says much about torch's and its own deprecations
    warnings.simplefilter("ignore")
    from executorch.backends.xnnpack.xnnpack_preprocess import XnnpackBackend
    from executorch.exir import EdgeCompileConfig, ExecutorchBackendConfig, to_edge_transform_and_lower
    from executorch.exir._serialize._cord import Cord
    from executorch.exir._serialize._named_data_store import NamedDataStore
    from executorch.exir._serialize.data_serializer import DataPayload
    from executorch.exir.backend.partitioner import DelegationSpec, Partitioner, PartitionResult
    from executorch.exir.dialects._ops import ops
    from executorch.extension.flat_tensor.serialize.serialize import FlatTensorSerializer

__all__ = ["write_programs"]

_ATEN = torch.ops.aten
_FROZEN = (InputKind.BUFFER, InputKind.PARAMETER, InputKind.CONSTANT_TENSOR)
_TAG = "weights"


def write_programs(programs: Iterable[tuple[str, ExportedProgram]], weights: str, directory: Path) -> None:
    """Lower each program to the file of its name, and write once, to `weights`, every tensor of all."""
    store, serializer = NamedDataStore(), FlatTensorSerializer()
    with _quiet():
        for name, program in programs:
            code, data = _lower(program)
            (directory / name).write_bytes(code)
            store.merge_named_data_store(serializer.deserialize_to_named_data_store_output(data, _TAG))
        merged = store.get_named_data_store_output()
        payload = DataPayload(buffers=merged.buffers, named_data=merged.external_data[_TAG])
        (directory / weights).write_bytes(bytes(serializer.serialize(payload)))


def _lower(program: ExportedProgram) -> tuple[bytes, Cord]:
    """The program and its tensors, each named by what it holds, so that other weights are never mistaken."""
    _name_by_content(program)
    _simplify(program.graph, _frozen_names(program))
    program.graph_module.recompile()
    edge = to_edge_transform_and_lower(
        program,
        partitioner=[_FrozenProducts()],
        compile_config=EdgeCompileConfig(_check_ir_validity=False),
    )
    lowered = edge.to_executorch(ExecutorchBackendConfig(external_constants=lambda node: _TAG))
    with tempfile.TemporaryDirectory() as directory:
        lowered.write_tensor_data_to_file(directory)
        data = (Path(directory) / f"{_TAG}.ptd").read_bytes()
    return lowered.buffer, Cord(data)


def _frozen_names(program: ExportedProgram) -> set[str]:
    return {s.arg.name for s in program.graph_signature.input_specs if s.kind in _FROZEN}


def _name_by_content(program: ExportedProgram) -> None:
    """Give each constant the name of its bytes, and let equal ones be one."""
    nodes = {node.name: node for node in program.graph.nodes if node.op == "placeholder"}
    first: dict[str, Node] = {}
    for spec in program.graph_signature.input_specs:
        if spec.kind not in _FROZEN or spec.target is None:
            continue
        held = program.state_dict if spec.target in program.state_dict else program.constants
        value = held.pop(spec.target)
        name, node = _digest(value), nodes[spec.arg.name]
        if name in first:
            node.replace_all_uses_with(first[name])
            name = f"{name}_{len(first)}_{node.name}"
        else:
            first[name] = node
        held[name] = value
        spec.target = name


def _digest(value: Tensor) -> str:
    digest = hashlib.sha256(f"{value.dtype} {tuple(value.shape)}\n".encode())
    digest.update(value.detach().contiguous().numpy().tobytes())
    return f"t{digest.hexdigest()[:32]}"


# graph


def _simplify(graph: Graph, frozen: set[str]) -> None:
    """Products with a frozen W (out, in) or its transpose become `linear` and `mm` on W itself."""
    for node in list(graph.nodes):
        if node.target in (_ATEN.alias.default, _ATEN.detach.default):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
    for node in list(graph.nodes):
        if node.target is _ATEN.permute.default:
            _join_permutes(graph, node)
    for node in list(graph.nodes):
        if node.target is _ATEN.addmm.default:
            _split_addmm(graph, node, frozen)
        elif node.target is _ATEN.mm.default and (weight := _transposed(node.args[1], frozen)):
            _replace(graph, node, _ATEN.linear.default, (node.args[0], weight))
    graph.eliminate_dead_code()


def _join_permutes(graph: Graph, node: Node) -> None:
    """A permutation of a permutation is one, or none."""
    inner: Any = node.args[0]
    if not isinstance(inner, Node) or inner.target is not _ATEN.permute.default:
        return
    first: Any = inner.args[1]
    outer: Any = node.args[1]
    order = [first[i] for i in outer]
    if order == sorted(order):
        node.replace_all_uses_with(inner.args[0])  # type: ignore[arg-type]
        graph.erase_node(node)
    else:
        node.args = (inner.args[0], order)


def _split_addmm(graph: Graph, node: Node, frozen: set[str]) -> None:
    """`addmm` has a slow kernel; with a frozen weight and bias it is a `linear`."""
    bias, x, factor = node.args
    weight = _transposed(factor, frozen)
    if weight is not None and isinstance(bias, Node) and bias.name in frozen:
        _replace(graph, node, _ATEN.linear.default, (x, weight, bias))
        return
    with graph.inserting_before(node):
        product = graph.call_function(_ATEN.mm.default, (x, factor))
        product.meta = dict(node.meta)
    _replace(graph, node, _ATEN.add.Tensor, (product, bias))


def _transposed(node: object, frozen: set[str]) -> Node | None:
    """W where the node is the transpose of a frozen W."""
    if not isinstance(node, Node) or node.target is not _ATEN.permute.default:
        return None
    inner = node.args[0]
    return inner if isinstance(inner, Node) and inner.name in frozen else None


def _replace(graph: Graph, node: Node, target: Any, args: tuple[Any, ...]) -> None:
    with graph.inserting_before(node):
        new = graph.call_function(target, args)
    new.meta = dict(node.meta)
    node.replace_all_uses_with(new)
    graph.erase_node(node)


class _FrozenProducts(Partitioner):  # type: ignore[misc, unused-ignore]
    """Marks each product of an activation with a frozen weight for XNNPACK, one by one.

    ExecuTorch's own partitioner looks through the whole graph at each node, which takes minutes here.
    """

    _PRODUCTS = (ops.edge.aten.mm.default, ops.edge.aten.linear.default)

    def ops_to_not_decompose(self, _program: ExportedProgram) -> tuple[list[Any], None]:
        return [_ATEN.linear.default], None

    def partition(self, exported_program: ExportedProgram) -> PartitionResult:
        frozen = _frozen_names(exported_program)
        tags: dict[str, DelegationSpec] = {}
        for index, node in enumerate(exported_program.graph.nodes):
            if node.target in self._PRODUCTS and node.args[1].name in frozen:
                tag = node.meta["delegation_tag"] = f"product{index}"
                tags[tag] = DelegationSpec(XnnpackBackend.__name__, [])
        return PartitionResult(tagged_exported_program=exported_program, partition_tags=tags)


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
