"""What ExecuTorch computes slowly or twice, written otherwise in the traced graph before it is lowered."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from executorch.backends.transforms.utils import create_constant_placeholder, delete_constant_placeholder
from torch import Tensor
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.fx import Graph, Node

from .executorch_products import write_products
from .quantise import Stored

__all__ = ["FROZEN", "compute_late", "digest", "frozen_names", "shape_of", "simplify", "store"]

_ATEN = torch.ops.aten
FROZEN = (InputKind.BUFFER, InputKind.PARAMETER, InputKind.CONSTANT_TENSOR)
_TINY = 1e-30  #: ε of `_reuse_gelu`, far below the square of any x that matters


# constants


def frozen_names(program: ExportedProgram) -> set[str]:
    return {s.arg.name for s in program.graph_signature.input_specs if s.kind in FROZEN}


def _values(program: ExportedProgram) -> dict[str, Tensor]:
    """The constants, by the names of their nodes."""
    held = {**program.state_dict, **program.constants}
    specs = program.graph_signature.input_specs
    return {s.arg.name: held[s.target] for s in specs if s.kind in FROZEN and s.target in held}


def store(program: ExportedProgram, stored: Mapping[int, Stored]) -> None:
    """Put what is stored in the place of each matrix, known by its address; each use computes it again.

    Where integers are multiplied there is no such use.
    """
    graph = program.graph
    nodes = {node.name: node for node in graph.nodes if node.op == "placeholder"}
    for name, value in _values(program).items():
        if (kept := stored.get(value.data_ptr())) is None:
            continue
        weight = nodes[name]
        if kept.multiplied:
            write_products(graph, weight, kept, partial(_constant, program))
        codes = _constant(program, kept.codes)
        scale = None if kept.scale is None else _constant(program, kept.scale[:, None])
        for node in list(weight.users):
            if node.target is _ATEN.embedding.default:
                rows = [_rows(graph, part, node) for part in (codes, scale) if part is not None]
                with graph.inserting_before(node):
                    node.replace_all_uses_with(_value(graph, rows, node))
                graph.erase_node(node)
            else:
                with graph.inserting_before(node):
                    found = _value(graph, [part for part in (codes, scale) if part is not None], weight)
                node.replace_input_with(weight, found)
        delete_constant_placeholder(program, weight)


def _constant(program: ExportedProgram, value: Tensor) -> Node:
    """The constant of this value, made where there is none."""
    graph, name = program.graph, digest(value)
    known = {spec.target: spec.arg.name for spec in program.graph_signature.input_specs}
    node: Node | None = next((node for node in graph.nodes if node.name == known.get(name)), None)
    if node is None:
        with graph.inserting_before(next(iter(graph.nodes))):
            node = create_constant_placeholder(
                program, graph, name, InputKind.BUFFER, value, persistent_buffer=True
            )
    return node


def _rows(graph: Graph, table: Node, like: Node) -> Node:
    """The rows of a table that an embedding looks up."""
    with graph.inserting_before(like):
        node = graph.call_function(_ATEN.embedding.default, (table, like.args[1]))
    size = table.meta["val"].shape[1]
    node.meta = dict(like.meta)
    node.meta["val"] = like.meta["val"][..., :size].to(table.meta["val"].dtype)
    return node


def _value(graph: Graph, parts: list[Node], like: Node) -> Node:
    """codes and, for int8, their scales -> float32."""
    copied = graph.call_function(_ATEN._to_copy.default, (parts[0],), {"dtype": torch.float32})
    copied.meta = dict(like.meta)
    return copied if len(parts) == 1 else _made(graph, _ATEN.mul.Tensor, (copied, parts[1]), like)


def compute_late(graph: Graph, frozen: set[str]) -> None:
    """Put what is computed of constants alone right before the first that reads it.

    Lowering orders by how far a node is from the inputs, so that all matrices would be computed at first, and
    lie in memory together.
    """
    known: set[Node] = set()
    for node in graph.nodes:
        if node.name in frozen or (node.op == "call_function" and known.issuperset(node.all_input_nodes)):
            known.add(node)
    for node in reversed(list(graph.nodes)):
        if node in known and node.op == "call_function" and node.users:
            min(node.users).prepend(node)


def digest(value: Tensor) -> str:
    digest = hashlib.sha256(f"{value.dtype} {tuple(value.shape)}\n".encode())
    digest.update(value.detach().contiguous().numpy().tobytes())
    return f"t{digest.hexdigest()[:32]}"


# operators


def simplify(graph: Graph, frozen: set[str]) -> None:
    """Products with a frozen W (out, in) or its transpose become `linear` and `mm` on W itself."""
    for node in list(graph.nodes):
        if node.target in (_ATEN.alias.default, _ATEN.detach.default):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
    for node in list(graph.nodes):
        if node.target is _ATEN.permute.default:
            _join_permutes(graph, node)
    for node in list(graph.nodes):
        _rewrite(graph, node, frozen)
    graph.eliminate_dead_code()


def _rewrite(graph: Graph, node: Node, frozen: set[str]) -> None:
    """Write one operator otherwise, where that is faster or keeps sizes dynamic."""
    if node.target is _ATEN.addmm.default:
        _split_addmm(graph, node, frozen)
    elif node.target is _ATEN.mm.default:
        _read_in_place(graph, node, frozen)
    elif node.target is _ATEN.expand.default and shape_of(node) == shape_of(node.args[0]):
        node.replace_all_uses_with(node.args[0])  # type: ignore[arg-type]
    elif node.target is _ATEN.empty.memory_format:  # whose sizes would become those of the example
        _replace(graph, node, _ATEN.full.default, (node.args[0], 0), dtype=node.meta["val"].dtype)
    elif node.target is _ATEN.erf.default:
        _reuse_gelu(graph, node)
    elif node.target is _ATEN.mean.dim:
        _average_by_product(graph, node)


def shape_of(node: Any) -> list[Any]:
    return list(node.meta["val"].shape)


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


def _read_in_place(graph: Graph, node: Node, frozen: set[str]) -> None:
    """x Wᵀ is a `linear`; Aᵀ B with an A wider than B is (Bᵀ A)ᵀ, which copies the narrower of the two."""
    first, second = node.args
    if (weight := _transposed(second, frozen)) is not None:
        _replace(graph, node, _ATEN.linear.default, (first, weight))
        return
    if not isinstance(first, Node) or first.target is not _ATEN.permute.default:
        return
    (rows, columns), inner = shape_of(node), first.args[0]
    if isinstance(rows, int) and isinstance(columns, int) and rows > columns:
        with graph.inserting_before(node):
            narrow = _made(graph, _ATEN.permute.default, (second, [1, 0]), first)
            product = _made(graph, _ATEN.mm.default, (narrow, inner), node)
            turned = _made(graph, _ATEN.permute.default, (product, [1, 0]), node)
        narrow.meta["val"] = second.meta["val"].t()  # type: ignore[union-attr]
        product.meta["val"] = node.meta["val"].t()
        _replace(graph, node, _ATEN.clone.default, (turned,), memory_format=torch.contiguous_format)


def _reuse_gelu(graph: Graph, erf: Node) -> None:
    """Φ(x) = gelu(x) / x, from the forward pass, where the backward pass computes ½ (1 + erf(x / √2)).

    As (x gelu(x) + ε/2) / (x² + ε), which for an x too small to be squared is ½, as it should.
    """
    scaled: Any = erf.args[0]
    x: Any = scaled.args[0] if scaled.target is _ATEN.mul.Tensor else None
    gelu = next((n for n in x.users if n.target is _ATEN.gelu.default and not n.kwargs), None) if x else None
    added = _only_user(erf, _ATEN.add.Tensor, 1)
    cdf = _only_user(added, _ATEN.mul.Tensor, 0.5)
    if gelu is None or cdf is None:
        return
    with graph.inserting_before(cdf):
        above = _made(graph, _ATEN.mul.Tensor, (gelu, x), cdf)
        above = _made(graph, _ATEN.add.Tensor, (above, _TINY / 2), cdf)
        square = _made(graph, _ATEN.mul.Tensor, (x, x), cdf)
        below = _made(graph, _ATEN.add.Tensor, (square, _TINY), cdf)
    for node in list(x.users):
        if node.target is _ATEN.mul.Tensor and node.args == (x, x) and square < node:
            node.replace_all_uses_with(square)
    _replace(graph, cdf, _ATEN.div.Tensor, (above, below))


def _average_by_product(graph: Graph, node: Node) -> None:
    """A mean over the last dimension, of N numbers, is a product with N times 1/N, whose kernel is fast."""
    x: Any = node.args[0]
    size = shape_of(x)[-1]
    if list(node.args[1:]) != [[-1], True] or not isinstance(size, int):
        return
    with graph.inserting_before(node):
        parts = graph.call_function(_ATEN.full.default, ([1, size], 1 / size), {"dtype": x.meta["val"].dtype})
    parts.meta = {"val": x.meta["val"].new_empty((1, size))}
    _replace(graph, node, _ATEN.linear.default, (x, parts))


def _only_user(node: Node | None, target: Any, number: float) -> Node | None:
    """The node's one user, where it is this operator with this number."""
    user = next(iter(node.users)) if node is not None and len(node.users) == 1 else None
    return user if user is not None and user.target is target and user.args[1] == number else None


def _made(graph: Graph, target: Any, args: tuple[Any, ...], like: Node) -> Node:
    node = graph.call_function(target, args)
    node.meta = dict(like.meta)
    return node


def _transposed(node: object, frozen: set[str]) -> Node | None:
    """W where the node is the transpose of a frozen W."""
    if not isinstance(node, Node) or node.target is not _ATEN.permute.default:
        return None
    inner = node.args[0]
    return inner if isinstance(inner, Node) and inner.name in frozen else None


def _replace(graph: Graph, node: Node, target: Any, args: tuple[Any, ...], **options: Any) -> None:
    with graph.inserting_before(node):
        new = graph.call_function(target, args, options)
    new.meta = dict(node.meta)
    node.replace_all_uses_with(new)
    graph.erase_node(node)
