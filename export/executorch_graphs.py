"""The programs of a bundle for ExecuTorch: what they are, made where its package is installed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from torch import Tensor, nn
from torch.export import ExportedProgram

from fedtt.errors import ConfigError
from fedtt.manifest import Graphs

from .compiling import compiling
from .depths import CUT_AXES, PrefixStep, StepAbove, cut_graphs, cut_inputs
from .inputs import TRACED, random_inputs
from .private import PRIVATE_AXES, PrivateStep, private_inputs
from .step import AdaptedModel, TrainingStep
from .trace import AXES, trace

__all__ = ["EXECUTORCH", "executorch_graphs"]

EXECUTORCH = "1.5.1"  #: the release that lowers, and exactly the one that a device must run

_ROWS = 32  #: most rows of a batch; memory is planned for them, and made resident only where it is written
_STEP, _EVAL, _PRIVATE, _WEIGHTS = "step.pte", "eval.pte", "private.pte", "base.ptd"


class _Step(nn.Module):
    """The training step without its logits, which only an evaluation reads."""

    def __init__(self, model: AdaptedModel) -> None:
        super().__init__()
        self.step = TrainingStep(model)

    def forward(self, theta: Tensor, *batch: Tensor) -> tuple[Tensor, Tensor]:
        loss, gradient, _ = self.step(theta, *batch)
        return loss, gradient


def executorch_graphs(
    model: AdaptedModel, depths: tuple[int, ...], max_tokens: int, directory: Path, *, private: bool
) -> Graphs:
    """Write the whole step, those of `depths`, evaluation, weights and, if asked for, the step that clips.

    Raises ConfigError where executorch is not installed, or a program cannot be lowered.
    """
    try:
        from .to_executorch import write_programs
    except ImportError as error:
        raise ConfigError(
            "runtimes", "executorch", f"only where it is installed ({error}): pip install 'fedtt[executorch]'"
        ) from None
    cuts = tuple(cut_graphs(model, depth, "pte") for depth in depths)
    found = Graphs(
        step=_STEP,
        eval=_EVAL,
        private=_PRIVATE if private else None,
        weights=(_WEIGHTS,),
        depths=cuts,
        rows=_ROWS,
    )
    addresses = {name: weight.data_ptr() for name, weight in model.named_parameters()}
    stored = {addresses[name]: kept for name, kept in model.stored.items()}
    write_programs(_programs(model, found, max_tokens), _WEIGHTS, directory, stored)
    return found


def _programs(model: AdaptedModel, names: Graphs, max_tokens: int) -> Iterator[tuple[str, ExportedProgram]]:
    """Each traced when it is asked for, so that one at a time holds memory."""
    most = {"batch": _ROWS, "tokens": max_tokens}
    inputs = random_inputs(model, *TRACED)
    forward = {name: inputs[name] for name in PrefixStep.inputs}
    yield names.step, _traced(names.step, _Step(model), inputs, AXES, most)
    yield names.eval, _traced(names.eval, model, forward, AXES, most)
    if names.private is not None:
        clipped = private_inputs(model, *TRACED)
        yield names.private, _traced(names.private, PrivateStep(model), clipped, PRIVATE_AXES, most)
    for cut in names.depths:
        prefix, above = PrefixStep(model, cut.depth), StepAbove(model, cut.depth)
        yield cut.prefix, _traced(cut.prefix, prefix, forward, AXES, most)
        yield cut.step, _traced(cut.step, above, cut_inputs(prefix, above, *TRACED), CUT_AXES, most)


def _traced(
    name: str,
    module: nn.Module,
    inputs: Mapping[str, Tensor],
    axes: Mapping[str, tuple[str, ...]],
    most: Mapping[str, int],
) -> ExportedProgram:
    with compiling(name, "executorch"):
        return trace(module, inputs, axes, most)
