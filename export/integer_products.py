"""Products with the frozen matrices of a model's blocks in integers, forward and backward.

Of a layer with W = diag(s) Q, s (M,) and Q (M, N) of int8, for rows x (T, N) and gradients g (T, M):

    forward    y_t  = a_t s (q_t Qᵀ) + b,   q_t = round(x_t / a_t),         a_t = max |x_t| / 127
    backward   x̄_t  = a_t (q_t Q),          q_t = round((g_t s) / a_t),     a_t = max |g_t s| / 127

One Q serves both, for s joins a gradient before it is rounded. Every row has a step a_t of its own (by token:
Z. Yao et al. "ZeroQuant". NeurIPS 2022, arXiv 2206.01861), so that what comes of a row does not depend on
others beside it: passes may be cut anywhere, and an example's gradient is of that example alone.

So in ONNX Runtime. In ExecuTorch XNNPACK rounds rows by itself, to 255 steps from a row's least number to its
largest: `by_range`. A row that has both signs alike gets nearly the same steps.

`products_in_graphs` and `executorch_products` change graphs, `IntegerProducts` does the same in torch. All
round the same numbers but for the last bit of float sums: where that turns a half the other way, a number
moves by a step, and others with it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from .quantise import MULTIPLIED_LEVELS, Stored

__all__ = ["LEAST", "LEVELS", "IntegerProducts", "Rounding", "by_largest", "by_range"]

Rounding = Callable[[Tensor], tuple[Tensor, Tensor]]  #: x (T, N) -> whole numbers (T, N), their steps (T, 1)

LEVELS = 127  #: of each sign, of a row
LEAST = 1e-30  #: of what is largest in a row, so that one of zeros stays one
_LOWEST, _HIGHEST = -128.0, 127.0  #: of int8
_MOST = 255  #: whole number of a row, where all of it has one sign
_EXACT = 2**24  #: float32 holds every integer up to it


def by_largest(x: Tensor) -> tuple[Tensor, Tensor]:
    """x in steps of its largest number, of either sign, over 127."""
    step = torch.maximum(x.amax(1, keepdim=True), -x.amin(1, keepdim=True)).clamp(min=LEAST) / LEVELS
    return torch.round(x / step), step


def by_range(x: Tensor) -> tuple[Tensor, Tensor]:
    """x in 255 steps from its least number to its largest, or to 0 where that is not between.

    As XNNPACK's `xnn_f32_qd8_asymmetric_quantization_params`: what stands for 0 is whole, too, and rows are
    cut to the 256 numbers around it.
    """
    low, high = x.amin(1, keepdim=True).clamp(max=0), x.amax(1, keepdim=True).clamp(min=0)
    steps = torch.where(low == high, 1.0, (_HIGHEST - _LOWEST) / (high - low))
    from_low, from_high = _LOWEST + low * steps, _HIGHEST + high * steps
    zero = torch.where(from_low + from_high > 0, _LOWEST - low * steps, _HIGHEST - high * steps)
    zero = torch.round(zero.clamp(_LOWEST, _HIGHEST))
    whole = torch.round(x * steps)
    return torch.minimum(torch.maximum(whole, _LOWEST - zero), _HIGHEST - zero), 1 / steps


class IntegerProducts(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch leaves it untyped
    """While it is on, `mm` and `addmm` by a frozen matrix are in integers, backward passes included.

    stored: by name, as of `parameters`. On without any it changes nothing. rounding: as the runtime's.
    """

    def __init__(
        self, parameters: Mapping[str, Tensor], stored: Mapping[str, Stored], rounding: Rounding = by_largest
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._rounding = rounding
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
                return sum(bias, _product(x, *found, self._rounding, transposed=not matrix.is_contiguous()))
        return func(*args, **(kwargs or {}))


def _product(x: Tensor, codes: Tensor, scale: Tensor, rounding: Rounding, *, transposed: bool) -> Tensor:
    """x (T, N) by the transpose of diag(scale) codes (M, N), or x (T, M) by itself."""
    codes, scale = codes.to(x.device), scale.to(x.device)
    whole, step = rounding(x if transposed else x * scale)
    matrix = codes.T if transposed else codes
    exact = torch.float32 if _MOST * MULTIPLIED_LEVELS * len(matrix) < _EXACT else torch.float64
    product = torch.mm(whole.to(exact), matrix.to(exact)).to(torch.float32)
    return (product * scale if transposed else product) * step
