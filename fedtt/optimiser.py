"""Local optimisers on the flat vector of live factors.

AdamW: Loshchilov & Hutter, "Decoupled weight decay regularization", ICLR 2019, Algorithm 2.
"""

from __future__ import annotations

from typing import Annotated, Literal

import numpy as np
from msgspec import Meta, Struct
from numpy.typing import NDArray

__all__ = ["Optimiser", "TrainingSpec"]

Vector = NDArray[np.float32]
Fraction = Annotated[float, Meta(ge=0, lt=1)]


class TrainingSpec(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a device does between download and upload."""

    optimiser: Literal["adamw", "sgd"] = "adamw"
    learning_rate: Annotated[float, Meta(gt=0, le=10)] = 5e-3
    weight_decay: Annotated[float, Meta(ge=0, le=1)] = 0.0
    momentum: Fraction = 0.9  #: β₁ of AdamW, μ of SGD
    second_moment: Fraction = 0.999  #: β₂ of AdamW
    proximal: Annotated[float, Meta(ge=0, le=1e3)] = 0.0  #: μ of FedProx: pull back to where training began
    local_steps: Annotated[int, Meta(ge=1, le=100_000)] = 10
    batch_size: Annotated[int, Meta(ge=1, le=4096)] = 16
    depth: Annotated[int, Meta(ge=1, le=2**10)] | None = None  #: last blocks trained; None for all adapted
    max_tokens: Annotated[int, Meta(ge=1, le=65536)] | None = None  #: cut texts here; None for the bundle's


class Optimiser:
    """State of one local training; made anew for each update."""

    def __init__(self, spec: TrainingSpec, size: int) -> None:
        self.spec = spec
        self.steps = 0
        self._m = np.zeros(size, np.float32)
        self._v = np.zeros(size, np.float32)

    def step_(self, theta: Vector, grad: Vector) -> None:
        """Move theta (size,) along -grad (size,), in place."""
        spec, eta = self.spec, np.float32(self.spec.learning_rate)
        self.steps += 1
        theta *= np.float32(1 - spec.learning_rate * spec.weight_decay)  # line 12: - η λ θ
        if spec.optimiser == "sgd":
            self._m = np.float32(spec.momentum) * self._m + grad
            theta -= eta * self._m
            return
        b1, b2 = spec.momentum, spec.second_moment  # 1 - β in float64: in float32 it is 1e-5 off for 0.999
        self._m = np.float32(b1) * self._m + np.float32(1 - b1) * grad  # lines 7 to 10, and the rest of 12
        self._v = np.float32(b2) * self._v + np.float32(1 - b2) * grad * grad
        m_hat = self._m / np.float32(1 - b1**self.steps)
        v_hat = self._v / np.float32(1 - b2**self.steps)
        theta -= eta * m_hat / (np.sqrt(v_hat) + np.float32(1e-8))
