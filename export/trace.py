"""From a module to an ATen graph with dynamic batch and sequence length.

`torch.export` cannot see through `torch.func.grad`; `make_fx` can, and its graph then exports as usual.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._decomp import core_aten_decompositions
from torch.export import Dim, ExportedProgram
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from .gradients import layer_norm_backward

__all__ = ["AXES", "MIN_TOKENS", "FlatProducts", "decomposed_once", "trace"]

MIN_TOKENS = 3  #: a causal step over shorter rows would have a dimension of 1, which tracing specialises

#: Dynamic sizes of a training step's inputs; what is left out of a shape is fixed.
AXES = {"theta": (), "ids": ("batch", "tokens"), "mask": ("batch", "tokens"), "labels": ("batch",)}

_SIZE = torch.ops.aten.sym_size.int  #: which exporters' tables list and nothing becomes of
_MATMULS = (torch.matmul, Tensor.matmul, Tensor.__matmul__)


class FlatProducts(TorchFunctionMode):
    """Runs `linear` and `matmul` as 2-D `mm`/`addmm` and 3-D `bmm`.

    Their own decompositions inside `torch.func.grad` turn dynamic sizes into constants.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is F.linear:
            return _linear(*args, **(kwargs or {}))
        if func in _MATMULS and not kwargs and max(arg.dim() for arg in args) > 2:
            return _matmul(*args)
        return func(*args, **(kwargs or {}))


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:  # noqa: A002
    flat = input.reshape(-1, input.shape[-1])
    product = torch.mm(flat, weight.t()) if bias is None else torch.addmm(bias, flat, weight.t())
    return product.reshape(*input.shape[:-1], weight.shape[0])


def _matmul(a: Tensor, b: Tensor) -> Tensor:
    """a (..., m, k) times b (..., k, n), leading dimensions broadcast; or b (k, n)."""
    if b.dim() == 2:
        return _linear(a, b.t())
    lead = torch.broadcast_shapes(a.shape[:-2], b.shape[:-2])  # type: ignore[no-untyped-call]
    a, b = (_spread(x, lead).reshape(-1, *x.shape[-2:]) for x in (a, b))
    return torch.bmm(a, b).reshape(*lead, a.shape[-2], b.shape[-1])


def _spread(x: Tensor, lead: Sequence[int]) -> Tensor:
    """x (..., m, k) with leading dimensions `lead`; without an operator where it has them."""
    return x if x.shape[:-2] == lead else x.expand(*lead, *x.shape[-2:])


def _decompositions() -> dict[Any, Callable[..., Any]]:
    """Core ATen, three operators that ONNX has no good form for, and gradients in fewer passes."""
    return {
        **core_aten_decompositions(),
        torch.ops.aten.native_layer_norm_backward.default: layer_norm_backward,
        torch.ops.aten.empty_permuted.default: _empty_permuted,
        torch.ops.aten.split_with_sizes.default: _split_with_sizes,
        torch.ops.aten.squeeze.dims: _squeeze,
    }


def _empty_permuted(size: Sequence[int], _order: Sequence[int], **kwargs: Any) -> Tensor:
    """Where memory is laid out otherwise, values are still the same."""
    return torch.empty(size, **kwargs)


def _split_with_sizes(x: Tensor, sizes: Sequence[int], dim: int = 0) -> list[Tensor]:
    """Slices, where ONNX would make a sequence, which runtimes on phones and in browsers lack."""
    ends = list(itertools.accumulate(sizes))
    return [x.narrow(dim, end - size, size) for size, end in zip(sizes, ends, strict=True)]


def _squeeze(x: Tensor, dims: Sequence[int]) -> Tensor:
    for dim in sorted((dim % x.dim() for dim in dims), reverse=True):
        x = x.select(dim, 0) if x.shape[dim] == 1 else x
    return x


def trace(
    module: nn.Module,
    inputs: Mapping[str, Tensor],
    axes: Mapping[str, tuple[str, ...]] = AXES,
    most: Mapping[str, int] | None = None,
) -> ExportedProgram:
    """Trace `module(*inputs)` on an example; the first sizes of each input, which `axes` names, stay dynamic.

    Sizes of one name are one size, at most what `most` says of it. In the example no two names may have the
    same size, nor any 0 or 1.
    """
    names = {name for named in axes.values() for name in named}
    least, most = {"tokens": MIN_TOKENS}, most or {}
    sizes = {name: Dim(name, min=least.get(name, 1), max=most.get(name)) for name in sorted(names)}
    example = tuple(inputs.values())
    with torch.no_grad(), FlatProducts():
        graph = make_fx(
            torch.func.functionalize(module),
            tracing_mode="symbolic",
            decomposition_table=_decompositions(),
            _allow_non_fake_inputs=True,
        )(*example)
        dynamic = tuple({d: sizes[axis] for d, axis in enumerate(axes[name])} for name in inputs)
        return torch.export.export(graph, example, dynamic_shapes=dynamic, strict=False)


@contextlib.contextmanager
def decomposed_once(program: ExportedProgram) -> Iterator[None]:
    """Spare a program that holds nothing to decompose from being traced again.

    `trace` decomposes, and exporters do once more, by a table of their own.
    """
    decompose = program.run_decompositions

    def where_needed(table: dict[Any, Callable[..., Any]]) -> ExportedProgram:
        is_left = any(node.target in table.keys() - {_SIZE} for node in program.graph.nodes)
        return decompose(table) if is_left else program

    program.run_decompositions = where_needed
    try:
        yield
    finally:
        del program.run_decompositions
