"""The programs of a bundle for ExecuTorch: what they are, made where its package is installed."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn

from fedtt.errors import ConfigError
from fedtt.manifest import Graphs

from .inputs import TRACED, random_inputs
from .step import AdaptedModel, TrainingStep
from .trace import trace

__all__ = ["EXECUTORCH", "executorch_graphs"]

EXECUTORCH = "1.5.1"  #: the release that lowers, and exactly the one that a device must run

_ROWS = 32  #: most rows of a batch; memory is planned for them, and made resident only where it is written
_STEP, _EVAL, _WEIGHTS = "step.pte", "eval.pte", "base.ptd"


class _Step(nn.Module):
    """The training step without its logits, which only an evaluation reads."""

    def __init__(self, model: AdaptedModel) -> None:
        super().__init__()
        self.step = TrainingStep(model)

    def forward(self, theta: Tensor, *batch: Tensor) -> tuple[Tensor, Tensor]:
        loss, gradient, _ = self.step(theta, *batch)
        return loss, gradient


def executorch_graphs(model: AdaptedModel, max_tokens: int, directory: Path) -> Graphs:
    """Write step, evaluation and their weights; raises ConfigError where executorch is not installed."""
    try:
        from .to_executorch import write_programs
    except ImportError as error:
        raise ConfigError(
            "runtimes", "executorch", f"only where it is installed ({error}): pip install 'fedtt[executorch]'"
        ) from None
    most = {"batch": _ROWS, "tokens": max_tokens}
    inputs = random_inputs(model, *TRACED)
    forward = {name: inputs[name] for name in ("theta", "ids", "mask")}
    programs = {_STEP: trace(_Step(model), inputs, most=most), _EVAL: trace(model, forward, most=most)}
    write_programs(programs, _WEIGHTS, directory)
    return Graphs(step=_STEP, eval=_EVAL, weights=(_WEIGHTS,), rows=_ROWS)
