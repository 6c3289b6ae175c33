"""Random inputs of the graphs: what is traced, and what torch and the graphs are compared on."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fedtt.adapter import initial_theta

from .step import AdaptedModel
from .trace import MIN_TOKENS

__all__ = ["TRACED", "random_inputs"]

TRACED = (3, 10)  #: batch and tokens of the example that is traced; any but 0 and 1 would do

_SPREAD = 0.05  #: standard deviation added to the factors' first values


def random_inputs(model: AdaptedModel, batch: int, tokens: int) -> dict[str, Tensor]:
    """Inputs of a training step by name, rows of different lengths; the same for the same shape.

    At the first values all cores but the last of `up` have no gradient, so theta is moved away from them.
    """
    rng = np.random.default_rng([batch, tokens])
    theta = initial_theta(model.spec, 0)
    theta += rng.normal(0.0, _SPREAD, theta.shape).astype(np.float32)
    ids = rng.integers(0, model.base.config.vocab_size, (batch, tokens))
    lengths = rng.integers(MIN_TOKENS, tokens, (batch, 1), endpoint=True)
    inputs = {"theta": theta, "ids": ids, "mask": (np.arange(tokens) < lengths).astype(np.int64)}
    if model.spec.head:
        inputs["labels"] = rng.integers(0, model.spec.head.labels, batch)
    return {name: torch.from_numpy(value) for name, value in inputs.items()}
