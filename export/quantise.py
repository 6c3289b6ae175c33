"""A smaller base: its matrices stored as fp16 or int8.

Weights are rounded in the torch model first, so that graphs, label rows and every comparison are of the same
rounded base. int8 is symmetric with a scale a row: of an embedding's token, of a layer's output channel.
Graphs compute float32 matrices of them where they are used, or multiply the integers themselves.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedtt.errors import ConfigError
from fedtt.manifest import Precision

__all__ = ["MULTIPLIED_LEVELS", "Stored", "quantise"]

_LEVELS = 127  #: of each sign
#: Of a matrix whose integers are multiplied. Processors without VNNI add pairs of products of a row's number,
#: at most 255, in 16 bits that saturate: 2 · 255 · 64 = 32,640 < 2^15, so all compute the same.
MULTIPLIED_LEVELS = 64


@dataclass(frozen=True)
class Stored:
    """One matrix (M, N) as it is stored: fp16 numbers, or int8 codes with a scale (M,) for each row."""

    codes: Tensor
    scale: Tensor | None = None
    multiplied: bool = False  #: whether products are of the integers: `integer_products`

    def value(self) -> Tensor:
        """The matrix in float32, to the bit what the graphs compute."""
        codes = self.codes.to(torch.float32)
        return codes if self.scale is None else codes * self.scale[:, None]


def quantise(model: nn.Module, precision: Precision, multiplied: Collection[str] = ()) -> dict[str, Stored]:
    """Round every matrix of a model in place; what is stored of each, by the parameter's name.

    multiplied: names of those whose integers are multiplied, of int8.
    Raises ConfigError for a weight that the precision cannot hold.
    """
    if precision == "fp32":
        return {}
    matrices = {name: weight for name, weight in model.named_parameters() if weight.dim() == 2}
    stored = {
        name: _stored(name, weight.detach(), precision, multiplied=name in multiplied)
        for name, weight in matrices.items()
    }
    with torch.no_grad():
        for name, weight in matrices.items():
            weight.copy_(stored[name].value())
    return stored


def _stored(name: str, weight: Tensor, precision: Precision, *, multiplied: bool) -> Stored:
    largest = weight.abs().amax(1)
    limit = torch.finfo(torch.float16 if precision == "fp16" else torch.float32).max
    if not bool((largest <= limit).all()):
        raise ConfigError(
            "base", precision, f"one that can hold {name}, whose largest weight is {largest.max():g}"
        )
    if precision == "fp16":
        return Stored(weight.to(torch.float16))
    levels = MULTIPLIED_LEVELS if multiplied else _LEVELS
    scale = torch.where(largest > 0, largest / levels, torch.ones_like(largest))
    codes = torch.round(weight / scale[:, None]).clamp(-levels, levels).to(torch.int8)
    return Stored(codes, scale, multiplied)
