"""Which operators of a lowered step XNNPACK computes, and which of them in one call."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator

import torch
from executorch.backends.xnnpack.xnnpack_preprocess import XnnpackBackend
from executorch.exir.backend.compile_spec_schema import CompileSpec
from executorch.exir.backend.partitioner import DelegationSpec, Partitioner, PartitionResult
from executorch.exir.dialects._ops import ops
from torch.export import ExportedProgram
from torch.fx import Node

from .executorch_passes import frozen_names, shape_of
from .executorch_products import joined_products

__all__ = ["XnnpackCalls"]

#: Makes the back end take one pass, that to `linear`, over each operator, and not all its 17.
_FEW_PASSES = CompileSpec("dqlinear_partitioner", b"")

_EDGE = ops.edge.aten
_PRODUCTS = (_EDGE.mm.default, _EDGE.linear.default, _EDGE.bmm.default)
_SOFTMAX = _EDGE._softmax.default
_OTHERS = (
    _EDGE.add.Tensor,
    _EDGE.sub.Tensor,
    _EDGE.mul.Tensor,
    _EDGE.div.Tensor,
    _EDGE.exp.default,
    _EDGE.gelu.default,
    _EDGE.permute_copy.default,
    _SOFTMAX,
)


class XnnpackCalls(Partitioner):  # type: ignore[misc, unused-ignore]
    """Marks for XNNPACK products and what else grows with the batch; neighbours share a call.

    ExecuTorch's own kernels know no more of a processor than what all of its kind have. XNNPACK's own
    partitioner looks through the whole graph at each node, which takes minutes here.
    """

    def __init__(self, tag: str) -> None:
        """tag: of the file of weights."""
        super().__init__()
        self._tag = tag

    def partition(self, exported_program: ExportedProgram) -> PartitionResult:
        nodes = list(exported_program.graph.nodes)
        frozen = frozen_names(exported_program)
        integers = list(joined_products(exported_program.graph, frozen))
        left = [node for node in nodes if not any(node in group for group in integers)]
        floats = [{node, *_scalars(node, frozen)} for node in left if _is_taken(node)]
        tags: dict[str, DelegationSpec] = {}
        for index, group in enumerate(_joined(nodes, [*integers, *floats])):
            tag = f"call{index}"
            tags[tag] = DelegationSpec(XnnpackBackend.__name__, [_FEW_PASSES])
            for node in group:
                node.meta |= {"delegation_tag": tag, "custom": {"delegate_constant_tag": self._tag}}
        return PartitionResult(tagged_exported_program=exported_program, partition_tags=tags)


def _is_taken(node: Node) -> bool:
    """Whether it is an operator over float32 that XNNPACK has, and not too small to be worth a call."""
    if node.op != "call_function" or node.kwargs:
        return False
    values = [
        value for value in (node, *node.all_input_nodes) if isinstance(value.meta.get("val"), torch.Tensor)
    ]
    if any(value.meta["val"].dtype is not torch.float32 for value in values):
        return False
    if node.target in _PRODUCTS:
        return any(_grows(value) for value in values)
    if node.target not in _OTHERS or not _grows(node) or not all(map(_is_readable, values)):
        return False
    return node.target is not _SOFTMAX or node.args[1] in (-1, len(shape_of(node)) - 1)


def _grows(node: Node) -> bool:
    """Whether its size is the batch's."""
    return not all(isinstance(size, int) for size in shape_of(node))


def _is_readable(node: Node) -> bool:
    """XNNPACK knows a number by itself as a constant alone."""
    return bool(shape_of(node)) or node.op == "placeholder"


def _scalars(node: Node, frozen: Collection[str]) -> Iterator[Node]:
    return (source for source in node.all_input_nodes if source.name in frozen and not shape_of(source))


def _joined(nodes: Iterable[Node], groups: Iterable[set[Node]]) -> list[set[Node]]:
    """The groups, each with those that it feeds where no way between them leads through others."""
    order = {node: index for index, node in enumerate(nodes)}
    group_of = {node: group for group in groups for node in group if node.op != "placeholder"}
    for node in order:
        for source in node.all_input_nodes if node in group_of else ():
            own, other = group_of[node], group_of.get(source, group_of[node])
            if other is not own and not _leads_round(other, own, group_of, order):
                other |= own
                group_of |= {moved: other for moved in own if moved.op != "placeholder"}
    return list({id(group): group for group in group_of.values()}.values())


def _leads_round(
    first: set[Node], second: set[Node], group_of: dict[Node, set[Node]], order: dict[Node, int]
) -> bool:
    """Whether what the second group reads comes of the first through nodes of neither."""
    start = min(order[node] for node in first if node.op != "placeholder")
    seen: set[Node] = set(first | second)
    left = [source for node in second for source in node.all_input_nodes if source not in seen]
    while left:
        node = left.pop()
        members = group_of.get(node, {node})
        if node in seen or max(order[member] for member in members) < start:
            continue
        seen |= members
        for source in (source for member in members for source in member.all_input_nodes):
            if source in first:
                return True
            left.append(source)
    return False
