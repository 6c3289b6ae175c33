"""The training step with each example's gradient clipped, as DP-SGD needs it.

DP-SGD: M. Abadi, A. Chu, I. Goodfellow, H. B. McMahan, I. Mironov, K. Talwar, L. Zhang. "Deep learning with
differential privacy". CCS 2016, arXiv 1607.00133, Algorithm 1. The noise is added outside, by the device.
"""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir
import torch
from torch import Tensor, nn

from .inputs import TRACED, random_inputs
from .step import AdaptedModel, next_token_nll, nll
from .to_onnx import convert
from .trace import AXES, trace

__all__ = ["PRIVATE_AXES", "PrivateStep", "private_inputs", "private_step"]

PRIVATE_AXES: dict[str, tuple[str, ...]] = {**AXES, "live": (), "clip": ()}


class PrivateStep(nn.Module):
    """theta (P,), ids (B, S), mask (B, S)[, labels (B,)], live (P,), clip () -> loss (), gradient (P,).

    gradient = 1/B Σ_b g_b min(1, clip / ‖g_b‖), g_b the gradient of example b's own loss where `live` is 1
    and zero elsewhere. For causal-lm an example's loss is the mean over its own tokens that follow others;
    the loss is the mean over examples.

    Every row has a copy of theta, so that the gradient of the summed losses holds each row's own. Dynamic
    sizes survive this in a trace, which they do not with `vmap`.
    """

    def __init__(self, model: AdaptedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, theta: Tensor, ids: Tensor, mask: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
        *labels, live, clip = rest

        def total(theta: Tensor) -> tuple[Tensor, Tensor]:
            losses = self._losses(theta, ids, mask, *labels)
            return losses.sum(), losses

        own = theta[None, :].expand(ids.shape[0], theta.shape[0])
        gradients, (_, losses) = torch.func.grad_and_value(total, has_aux=True)(own)
        gradients = gradients * live[None, :]
        norms = gradients.square().sum(1).sqrt()
        scale = (clip / norms.clamp(min=torch.finfo(norms.dtype).tiny)).clamp(max=1.0) / ids.shape[0]
        return losses.mean(), torch.mm(scale[None, :], gradients)[0]

    def _losses(self, theta: Tensor, ids: Tensor, mask: Tensor, *labels: Tensor) -> Tensor:
        """Each example's, (B,), under its own theta of (B, P)."""
        logits = self.model(theta, ids, mask)
        if self.model.head is not None:
            return nll(logits, labels[0])
        losses, follows = (found.reshape(ids.shape[0], -1) for found in next_token_nll(logits, ids, mask))
        return losses.sum(1) / follows.sum(1).clamp(min=1.0)


def private_step(model: AdaptedModel, weights: Mapping[str, Tensor]) -> ir.Model:
    """The graph of `PrivateStep`; weights: the base's and the head's rows, by name."""
    inputs = private_inputs(model, *TRACED)
    outputs: dict[str, tuple[str, ...]] = {"loss": (), "grad": ()}
    return convert(
        trace(PrivateStep(model), inputs, PRIVATE_AXES), list(inputs), weights, outputs, PRIVATE_AXES
    )


def private_inputs(model: AdaptedModel, batch: int, tokens: int) -> dict[str, Tensor]:
    """Random inputs by name, in the step's order; some rows are clipped, some of theta is not live."""
    inputs = random_inputs(model, batch, tokens)
    inputs["live"] = (torch.arange(len(inputs["theta"])) % 5 > 0).to(torch.float32)
    inputs["clip"] = torch.tensor(0.5)
    return inputs
