"""The two functions that are compiled: the adapted model, and its training step as a function of theta."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedtt.adapter import AdapterSpec

from .base import Base
from .head import Head, name_rows, pool
from .insert import Adapters
from .integer_products import IntegerProducts, by_largest, by_range
from .prefix import run_noting
from .quantise import Stored
from .request import RuntimeKind

__all__ = ["AdaptedModel", "TrainingStep", "next_token_nll", "nll"]

Run = Callable[[Tensor, Tensor], Tensor]  #: (ids or hidden state, mask) -> last hidden state


class AdaptedModel(nn.Module):
    """theta (P,), ids (B, S), mask (B, S) -> logits (B, C), or (B, S, V) for causal-lm.

    With `device` (B,) theta is that of D devices, (D, P), and row b is of device[b]: rows of all devices
    share every product with the frozen base.
    """

    def __init__(
        self, base: Base, spec: AdapterSpec, labels: Sequence[str] = (), head: Head | None = None
    ) -> None:
        """head: of another model with the same one, whose fixed rows are shared."""
        super().__init__()
        self.base, self.spec = base, spec
        self.transformer = base.model
        self.adapters = Adapters(base, spec)
        self.head = head or _head(base, spec, labels)

    def forward(
        self,
        theta: Tensor,
        ids: Tensor,
        mask: Tensor,
        *,
        device: Tensor | None = None,
        run: Run | None = None,
    ) -> Tensor:
        """run: what takes ids, or a hidden state in their place, through the base; all of it by default."""
        size = self.adapters.size
        adapters, head = torch.split(theta, [size, theta.shape[-1] - size], dim=-1)
        with self.adapters.holding(adapters, device):
            output = (run or self.base.run)(ids, mask)
        return output if self.head is None else cast("Tensor", self.head(pool(output, mask), head, device))

    @property
    def stored(self) -> dict[str, Stored]:
        """What is stored of the base's matrices, by the names of this module's parameters."""
        return {f"transformer.{name}": stored for name, stored in self.base.stored.items()}

    def products(self, runtime: RuntimeKind = "onnxruntime") -> IntegerProducts:
        """What torch computes under as a runtime's graphs do, where products by the base are in integers."""
        rounding = by_largest if runtime == "onnxruntime" else by_range
        return IntegerProducts(dict(self.named_parameters()), self.stored, rounding)

    def loss(
        self, theta: Tensor, ids: Tensor, mask: Tensor, *labels: Tensor, run: Run | None = None
    ) -> tuple[Tensor, Tensor]:
        """Mean negative log-likelihood, (), and the logits.

        With a head it is the mean over `labels` (B,), without over the tokens that follow others.
        """
        logits = self(theta, ids, mask, run=run)
        return self.mean_nll(logits, mask, ids if self.head is None else labels[0]), logits

    def mean_nll(self, logits: Tensor, mask: Tensor, targets: Tensor) -> Tensor:
        """targets: the labels (B,), without a head the ids (B, S)."""
        if self.head is not None:
            return nll(logits, targets).mean()
        losses, follows = next_token_nll(logits, targets, mask)
        return losses.sum() / follows.sum().clamp(min=1.0)


def _head(base: Base, spec: AdapterSpec, labels: Sequence[str]) -> Head | None:
    if spec.head is None:
        return None
    return Head(spec.head, name_rows(base, labels) if spec.head.kind == "label-names" else None)


def nll(logits: Tensor, targets: Tensor) -> Tensor:
    """(N, C) and (N,) -> (N,)."""
    return -F.log_softmax(logits, -1).gather(1, targets[:, None])[:, 0]


def next_token_nll(logits: Tensor, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """logits (B, S, V) of ids, mask (B, S) -> losses, and 1 where there is one, both (B (S - 1),)."""
    follows = mask[:, 1:].reshape(-1).to(logits.dtype)
    losses = nll(logits[:, :-1].reshape(-1, logits.shape[2]), ids[:, 1:].reshape(-1))
    return losses * follows, follows


class TrainingStep(nn.Module):
    """theta (P,), ids (B, S), mask (B, S)[, labels (B,)] -> loss (), gradient (P,), logits, hidden states.

    One trace of it yields several graphs: the step, the evaluation, and for each of `cuts` the prefix, whose
    hidden state enters that block.
    """

    def __init__(self, model: AdaptedModel, cuts: Sequence[int] = ()) -> None:
        super().__init__()
        self.model, self.cuts = model, tuple(cuts)

    def forward(self, theta: Tensor, *batch: Tensor) -> tuple[Tensor, ...]:
        step = torch.func.grad_and_value(self._loss, has_aux=True)
        gradient, (loss, noted) = step(theta, *batch)
        return loss, gradient, *noted

    def _loss(self, theta: Tensor, ids: Tensor, mask: Tensor, *labels: Tensor) -> tuple[Tensor, list[Tensor]]:
        hidden: list[Tensor] = []

        def run(ids: Tensor, mask: Tensor) -> Tensor:
            attention = self.model.adapters.after_attention
            output, found = run_noting(self.model.base, self.cuts, ids, mask, attention=attention)
            hidden.extend(found)
            return output

        loss, logits = self.model.loss(theta, ids, mask, *labels, run=run)
        return loss, [logits, *hidden]
