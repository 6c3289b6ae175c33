"""Products with the frozen matrices of a model's blocks in integers, forward and backward.

Of a layer with W = diag(s) Q, s (M,) and Q (M, N) of int8, for rows x (T, N) and gradients g (T, M):

    forward    y_t  = a_t s (q_t Qᵀ) + b,   q_t = round(x_t / a_t),         a_t = max |x_t| / 127
    backward   x̄_t  = a_t (q_t Q),          q_t = round((g_t s) / a_t),     a_t = max |g_t s| / 127

One Q serves both, for s joins a gradient before it is rounded. Every row has a step a_t of its own (by token:
Z. Yao et al. "ZeroQuant". NeurIPS 2022, arXiv 2206.01861), so that what comes of a row does not depend on
others beside it: passes may be cut anywhere, and an example's gradient is of that example alone.

`products_in_graphs` changes graphs, `IntegerProducts` does the same in torch. Both round the same numbers but
for the last bit of float sums: where that turns a half the other way, a number moves by a step, and others
with it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from .quantise import Stored

__all__ = ["LEAST", "LEVELS", "IntegerProducts"]

LEVELS = 127  #: of each sign, of a row
LEAST = 1e-30  #: of what is largest in a row, so that one of zeros stays one
_EXACT = 2**24  #: float32 holds every integer up to it


class IntegerProducts(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch leaves it untyped
    """While it is on, `mm` and `addmm` by a frozen matrix are in integers, backward passes included.

    stored: by name, as of `parameters`. On without any it changes nothing.
    """

    def __init__(self, parameters: Mapping[str, Tensor], stored: Mapping[str, Stored]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._matrices = {
            parameters[name].untyped_storage().data_ptr(): (kept.codes, kept.scale)
            for name, kept in stored.items()
            if kept.multiplied and kept.scale is not None
        }

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default) and not kwargs:
            *bias, x, matrix = args
            if found := self._matrices.get(matrix.untyped_storage().data_ptr()):
                return sum(bias, _product(x, *found, transposed=not matrix.is_contiguous()))
        return func(*args, **(kwargs or {}))


def _product(x: Tensor, codes: Tensor, scale: Tensor, *, transposed: bool) -> Tensor:
    """x (T, N) by the transpose of diag(scale) codes (M, N), or x (T, M) by itself."""
    codes, scale = codes.to(x.device), scale.to(x.device)
    x = x if transposed else x * scale
    step = torch.maximum(x.amax(1, keepdim=True), -x.amin(1, keepdim=True)).clamp(min=LEAST) / LEVELS
    matrix = codes.T if transposed else codes
    exact = torch.float32 if LEVELS**2 * len(matrix) < _EXACT else torch.float64
    product = torch.mm(torch.round(x / step).to(exact), matrix.to(exact)).to(torch.float32)
    return (product * scale if transposed else product) * step
