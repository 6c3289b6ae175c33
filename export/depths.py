"""The training step cut in two: what is below the blocks that train, and the step over the rest.

Both take the whole theta, so that one vector and one layout serve every depth. As a layout goes block by
block and ends with the head, what a shallower adapter trains is the end of theta.
"""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir
import torch
from msgspec.structs import replace
from torch import Tensor, nn

from fedtt.manifest import DepthGraphs

from .inputs import TRACED, random_inputs
from .prefix import Prefix, run_above
from .step import AdaptedModel
from .to_onnx import convert
from .trace import AXES, trace

__all__ = ["CUT_AXES", "PrefixStep", "StepAbove", "cut_graphs", "cut_inputs", "step_above"]

CUT_AXES: dict[str, tuple[str, ...]] = {**AXES, "hidden": ("batch", "tokens")}


def cut_graphs(model: AdaptedModel, depth: int, suffix: str) -> DepthGraphs:
    """How the two parts are called in a bundle."""
    return DepthGraphs(
        depth=depth,
        prefix=f"prefix-{depth}.{suffix}",
        step=f"step-{depth}.{suffix}",
        states=PrefixStep(model, depth).states,
    )


def step_above(model: AdaptedModel, depth: int, weights: Mapping[str, Tensor]) -> ir.Model:
    """The graph of `StepAbove`; weights: the base's and the head's rows, by name."""
    above = StepAbove(model, depth)
    inputs = cut_inputs(PrefixStep(model, depth), above, *TRACED)
    outputs: dict[str, tuple[str, ...]] = {"loss": (), "grad": ()}
    return convert(trace(above, inputs, CUT_AXES), list(inputs), weights, outputs, CUT_AXES)


def cut_inputs(prefix: PrefixStep, above: StepAbove, batch: int, tokens: int) -> dict[str, Tensor]:
    """Random inputs of the upper part, by name in its order; hidden is what the lower part gives."""
    inputs = random_inputs(prefix.model, batch, tokens)
    with torch.no_grad():
        inputs["hidden"] = prefix(*(inputs[name] for name in prefix.inputs))
    return {name: inputs[name] for name in above.inputs}


class PrefixStep(nn.Module):
    """theta (P,), ids (B, S), mask (B, S) -> hidden (B, S, W), which enters block `layers - depth`.

    W is H, or 2 H where the attention's output in that block is frozen, too, and goes with it.
    """

    inputs = ("theta", "ids", "mask")

    def __init__(self, model: AdaptedModel, depth: int) -> None:
        super().__init__()
        self.model = model
        cut, attention = model.spec.layers - depth, model.adapters.after_attention
        self.prefix = Prefix(model.base, cut, attention=attention)

    @property
    def states(self) -> int:
        """W / H."""
        return 1 + self.prefix.attention

    def forward(self, theta: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        with self.model.adapters.holding(theta[: self.model.adapters.size]):
            hidden: Tensor = self.prefix(ids, mask)
        return hidden


class StepAbove(nn.Module):
    """theta (P,), hidden (B, S, W), mask (B, S)[, ids (B, S)][, labels (B,)] -> loss (), gradient (P,).

    ids for causal-lm, whose targets they are; labels with a head. The gradient is zero for all blocks below
    the last `depth`.
    """

    def __init__(self, model: AdaptedModel, depth: int) -> None:
        super().__init__()
        spec = model.spec if depth == model.spec.depth else replace(model.spec, depth=depth)
        self.model = AdaptedModel(model.base, spec, head=model.head)
        self.cut = spec.layers - depth
        self.below = model.spec.size_below(depth)  #: numbers of theta that are not read
        self.inputs = ("theta", "hidden", "mask", "ids" if model.head is None else "labels")

    def forward(self, theta: Tensor, hidden: Tensor, mask: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        def run(hidden: Tensor, mask: Tensor) -> Tensor:
            attention = self.model.adapters.after_attention
            return run_above(self.model.base, self.cut, hidden, mask, attention=attention)

        def loss(theta: Tensor) -> Tensor:
            return self.model.mean_nll(self.model(theta, hidden, mask, run=run), mask, target)

        gradient, value = torch.func.grad_and_value(loss)(theta[self.below :])
        if self.below:
            gradient = torch.cat([torch.zeros_like(theta[: self.below]), gradient])
        return value, gradient
