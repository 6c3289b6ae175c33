"""The classifier head over mean-pooled tokens, and the label-name rows it may start from."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedtt.kinds import HeadSpec

from .base import Base
from .forms import flat, times, tt_halves

__all__ = ["Head", "name_rows", "pool"]

_LEAST = 1e-24  #: mean square of a text's features that are brought to length √H


@torch.no_grad()
def name_rows(base: Base, labels: Sequence[str]) -> Tensor:
    """Unit rows (C, H): the pooled state of each label's name, read as words, under the bare base."""
    words = [label.replace("_", " ").replace("-", " ") for label in labels]
    encoded = [base.tokenizer.encode(name).ids[: base.longest] or [base.pad_id] for name in words]
    rows = [base.run(ids, torch.ones_like(ids)).mean(1) for ids in (torch.tensor([e]) for e in encoded)]
    return F.normalize(torch.cat(rows), dim=1)


def pool(hidden: Tensor, mask: Tensor) -> Tensor:
    """Mean over the tokens that mask (B, S) marks: (B, S, H) -> (B, H); zero where it marks none."""
    weight = mask.to(hidden.dtype)[:, :, None]
    return (hidden * weight).sum(1) / weight.sum(1).clamp(min=1.0)


class Head(nn.Module):
    """logits (B, C) = x Wᵀ + b, W the head's trained matrix, b (C,).

    tt, dense: x is the pooled state. label-names: x = √H · pooled / ‖pooled‖ and W = E + Δ, with E the
    unit rows of the labels' names, so that the first logits are √H · cos(text, name).
    """

    rows: Tensor | None

    def __init__(self, spec: HeadSpec, rows: Tensor | None) -> None:
        super().__init__()
        self._spec = spec
        self.register_buffer("rows", rows)

    def forward(self, pooled: Tensor, numbers: Tensor, device: Tensor | None = None) -> Tensor:
        """pooled: (B, H); numbers: the head's part of theta, weight then bias.

        With `device` (B,) numbers are those of D devices, (D, ...), and row b is of device[b].
        """
        labels = self._spec.labels
        weight, bias = torch.split(numbers, [numbers.shape[-1] - labels, labels], dim=-1)
        parts = (*self._factors(weight), bias)
        if device is not None:
            parts = tuple(part.index_select(0, device) for part in parts)
        *factors, bias = parts
        x = pooled
        if self.rows is not None:
            x = pooled * (pooled * pooled).mean(1, keepdim=True).clamp_min(_LEAST).rsqrt()
        fixed = 0.0 if self.rows is None else torch.mm(x, self.rows.t())
        product = flat(x, factors[0])
        for factor in factors:
            product = times(product, factor)
        return product.reshape(x.shape[0], labels) + fixed + bias

    def _factors(self, numbers: Tensor) -> tuple[Tensor, ...]:
        """numbers (..., size) -> matrices (..., a, b) whose product is the transposed weight (..., H, C)."""
        lead, labels = numbers.shape[:-1], self._spec.labels
        if self._spec.matrix is None:
            return (numbers.reshape(*lead, labels, numbers.shape[-1] // labels).mT,)
        left, right = tt_halves(numbers.reshape(-1, numbers.shape[-1]), self._spec.matrix)
        left, right = (half.reshape(*lead, *half.shape[1:]) for half in (left, right[..., :labels]))
        return left, right
