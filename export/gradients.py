"""Gradients of what a frozen base is made of, in fewer passes over a batch than torch's decompositions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch._decomp import core_aten_decompositions

__all__ = ["layer_norm_backward"]


def layer_norm_backward(
    gradient: Tensor,
    x: Tensor,
    shape: Sequence[int],
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    wanted: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """`aten.native_layer_norm_backward`: the gradient of x (..., N), over its last dimension.

    With u = gradient * weight, c = x - mean and v = u - c rstd² mean(u c) it is rstd (v - mean(v)), where
    mean(v) = mean(u). Torch's own serves gradients of weight or bias, and norms over more dimensions.
    """
    if len(shape) > 1 or list(wanted) != [True, False, False]:
        own = core_aten_decompositions()[torch.ops.aten.native_layer_norm_backward.default]
        found: tuple[Tensor | None, Tensor | None, Tensor | None] = own(
            gradient, x, shape, mean, rstd, weight, bias, wanted
        )
        return found
    u = gradient if weight is None else gradient * weight
    centred = x - mean
    slope = (u * centred).mean(-1, keepdim=True) * (rstd * rstd)
    return ((u - centred * slope) - u.mean(-1, keepdim=True)) * rstd, None, None
