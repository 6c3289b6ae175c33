"""The runtime that is right by construction: torch on the very model a bundle was exported from."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from edge_client.bundle import Bundle, RuntimeName
from edge_client.runtime import Hidden
from edge_client.tokens import Batch
from export.base import load_base
from export.depths import PrefixStep, StepAbove
from export.private import PrivateStep
from export.step import AdaptedModel, TrainingStep
from fedtt.errors import RuntimeFailure
from fedtt.layout import Theta

__all__ = ["TorchOracle", "TorchRuntime", "adapted_model"]


def adapted_model(bundle: Bundle, model: Path, dtype: torch.dtype = torch.float32) -> AdaptedModel:
    """The bundle's adapters on its base, which `model` holds."""
    manifest = bundle.manifest
    base = load_base(str(model), manifest.task, manifest.model.precision, manifest.model.products)
    nn.Module.to(base.model, dtype)  # before the labels' rows are computed from it
    return AdaptedModel(base, manifest.adapter, manifest.labels)


class TorchRuntime:
    """A Runtime in float32, by the step that is compiled into a bundle's graphs."""

    name: RuntimeName = "onnxruntime"  #: whose graphs it stands in for
    rows: int | None = None

    def __init__(self, model: AdaptedModel, depths: tuple[int, ...] = ()) -> None:
        self._model, self._step = model, TrainingStep(model)
        self._cuts = {depth: (PrefixStep(model, depth), StepAbove(model, depth)) for depth in depths}
        self._guard = threading.Lock()  # the model holds theta while it runs

    def gradient(self, theta: Theta, batch: Batch) -> tuple[float, Theta]:
        inputs = self._inputs(theta, batch)
        labels = () if batch.labels is None else (torch.from_numpy(batch.labels),)
        loss, gradient, _ = self._run(self._step, *inputs, *labels)
        return float(loss), gradient.numpy()

    def private_gradient(
        self, theta: Theta, batch: Batch, live: NDArray[np.float32], clip: float
    ) -> tuple[float, Theta]:
        labels = () if batch.labels is None else (torch.from_numpy(batch.labels),)
        rest = (*labels, torch.from_numpy(live), torch.tensor(clip))
        loss, gradient = self._run(PrivateStep(self._model), *self._inputs(theta, batch), *rest)
        return float(loss), gradient.numpy()

    def logits(self, theta: Theta, batch: Batch) -> NDArray[np.float32]:
        (logits,) = self._run(self._model, *self._inputs(theta, batch))
        found: NDArray[np.float32] = logits.numpy()
        return found

    @property
    def depths(self) -> tuple[int, ...]:
        return tuple(self._cuts)

    def prefix(self, theta: Theta, batch: Batch, depth: int) -> Hidden:
        (hidden,) = self._run(self._cuts[depth][0], *self._inputs(theta, batch))
        found: Hidden = hidden.numpy()
        return found

    def gradient_above(self, theta: Theta, hidden: Hidden, batch: Batch, depth: int) -> tuple[float, Theta]:
        theta_, ids, mask = self._inputs(theta, batch)
        target = ids if batch.labels is None else torch.from_numpy(batch.labels)
        loss, gradient = self._run(self._cuts[depth][1], theta_, torch.from_numpy(hidden), mask, target)
        return float(loss), gradient.numpy()

    def release(self) -> None:
        """The model stays."""

    def _inputs(self, theta: Theta, batch: Batch) -> tuple[Tensor, ...]:
        self._model.spec.layout.check(theta)
        return tuple(torch.from_numpy(array) for array in (theta, batch.ids, batch.mask))

    def _run(self, function: nn.Module, *inputs: Tensor) -> tuple[Tensor, ...]:
        with self._guard, torch.no_grad():
            try:
                found = function(*inputs)
            except (IndexError, RuntimeError) as error:
                raise RuntimeFailure(f"torch did not run: {' '.join(str(error).split())}") from None
        return found if isinstance(found, tuple) else (found,)


class TorchOracle:
    """Loss, gradient and logits in float64, by plain backpropagation."""

    def __init__(self, bundle: Bundle, model: Path) -> None:
        self._model = adapted_model(bundle, model, torch.float64)

    def __call__(self, theta: Theta, batch: Batch) -> tuple[float, NDArray[np.float64], NDArray[np.float64]]:
        leaf = torch.from_numpy(theta.astype(np.float64)).requires_grad_()
        logits = self._model(leaf, torch.from_numpy(batch.ids), torch.from_numpy(batch.mask))
        loss = F.cross_entropy(logits, torch.from_numpy(batch.labels))
        (gradient,) = torch.autograd.grad(loss, leaf)
        return float(loss.detach()), gradient.numpy(), logits.detach().numpy()
