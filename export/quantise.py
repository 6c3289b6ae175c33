"""A smaller base: its matrices stored as fp16 or int8, computed with as float32.

Weights are rounded in the torch model first, so that graphs, label rows and every comparison are of the same
rounded base. int8 is symmetric with a scale a row: of an embedding's token, of a layer's output channel.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedtt.errors import ConfigError
from fedtt.manifest import Precision

__all__ = ["Stored", "quantise"]

_LEVELS = 127  #: of each sign


@dataclass(frozen=True)
class Stored:
    """One matrix (M, N) as it is stored: fp16 numbers, or int8 codes with a scale (M,) for each row."""

    codes: Tensor
    scale: Tensor | None = None

    def value(self) -> Tensor:
        """The matrix in float32, to the bit what the graphs compute."""
        codes = self.codes.to(torch.float32)
        return codes if self.scale is None else codes * self.scale[:, None]


def quantise(model: nn.Module, precision: Precision) -> dict[str, Stored]:
    """Round every matrix of a model in place; what is stored of each, by the parameter's name.

    Raises ConfigError for a weight that the precision cannot hold.
    """
    if precision == "fp32":
        return {}
    matrices = {name: weight for name, weight in model.named_parameters() if weight.dim() == 2}
    stored = {name: _stored(name, weight.detach(), precision) for name, weight in matrices.items()}
    with torch.no_grad():
        for name, weight in matrices.items():
            weight.copy_(stored[name].value())
    return stored


def _stored(name: str, weight: Tensor, precision: Precision) -> Stored:
    largest = weight.abs().amax(1)
    limit = torch.finfo(torch.float16 if precision == "fp16" else torch.float32).max
    if not bool((largest <= limit).all()):
        raise ConfigError(
            "base", precision, f"one that can hold {name}, whose largest weight is {largest.max():g}"
        )
    if precision == "fp16":
        return Stored(weight.to(torch.float16))
    scale = torch.where(largest > 0, largest / _LEVELS, torch.ones_like(largest))
    return Stored(torch.round(weight / scale[:, None]).clamp(-_LEVELS, _LEVELS).to(torch.int8), scale)
