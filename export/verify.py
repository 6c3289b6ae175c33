"""Graph and torch side by side: the same theta and batches, several shapes, seen and unseen in tracing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime
import torch
from msgspec import Struct
from numpy.typing import NDArray
from torch import Tensor

from fedtt.adapter import initial_theta
from fedtt.errors import BundleError
from fedtt.manifest import Manifest

from .base import load_base
from .bundle import read_bundle
from .step import AdaptedModel, TrainingStep
from .trace import MIN_TOKENS

__all__ = ["TOLERANCE", "TRACED", "Difference", "random_inputs", "verify_bundle", "verify_graphs"]

TOLERANCE = 1e-5  #: largest allowed ‖graph - torch‖ / ‖torch‖
TRACED = (3, 10)  #: batch and tokens of the example that is traced; any but 0 and 1 would do

_SPREAD = 0.05  #: standard deviation added to the factors' first values


class Difference(Struct, frozen=True, kw_only=True):
    """How far the graphs are from torch on one shape, ‖graph - torch‖ / ‖torch‖ of each output."""

    batch: int
    tokens: int
    loss: float
    grad: float
    logits: float

    @property
    def largest(self) -> float:
        return max(self.loss, self.grad, self.logits)

    def line(self) -> str:
        """For people; says whether tracing saw this shape."""
        seen = "traced" if (self.batch, self.tokens) == TRACED else "unseen"
        return (
            f"{self.batch:>2} x {self.tokens:<4} {seen}  "
            f"loss {self.loss:.1e}  grad {self.grad:.1e}  logits {self.logits:.1e}"
        )


def verify_bundle(directory: Path, model: str) -> tuple[Difference, ...]:
    """Compare a bundle's graphs with the model it was made from; raises BundleError where they differ."""
    manifest = read_bundle(directory)
    base = load_base(model, manifest.task)
    if base.sha256 != manifest.model.base_sha256:
        raise BundleError(
            f"{directory} was made from other weights than {model} holds; "
            f"give the model {manifest.model.name!r} that it was exported from"
        )
    return verify_graphs(directory, manifest, AdaptedModel(base, manifest.adapter, manifest.labels))


def verify_graphs(directory: Path, manifest: Manifest, model: AdaptedModel) -> tuple[Difference, ...]:
    """The difference on each shape, from the shortest rows to the longest; raises past TOLERANCE."""
    files = manifest.graphs["onnxruntime"]
    step, evaluation = (_session(directory / file) for file in (files.step, files.eval))
    longest = manifest.tokenization.max_tokens
    shapes = [TRACED, (1, MIN_TOKENS), (5, 17), (2, 64), (4, longest)]
    differences = tuple(
        _compare(step, evaluation, model, batch, min(tokens, longest)) for batch, tokens in shapes
    )
    for difference in differences:
        if not difference.largest <= TOLERANCE:
            raise BundleError(
                f"{directory}: graph and torch differ by {difference.largest:.1e} on a batch of "
                f"{difference.batch} x {difference.tokens} tokens, at most {TOLERANCE:.0e} is allowed; "
                "do not use this bundle, and report the model"
            )
    return differences


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


def _session(path: Path) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


def _compare(
    step: onnxruntime.InferenceSession,
    evaluation: onnxruntime.InferenceSession,
    model: AdaptedModel,
    batch: int,
    tokens: int,
) -> Difference:
    inputs = random_inputs(model, batch, tokens)
    with torch.no_grad():
        expected = [value.numpy() for value in TrainingStep(model)(*inputs.values())]
    feed = {name: value.numpy() for name, value in inputs.items()}
    loss, grad = step.run(["loss", "grad"], feed)
    (logits,) = evaluation.run(["logits"], {name: feed[name] for name in ("theta", "ids", "mask")})
    pairs = zip((loss, grad, logits), expected, strict=True)
    loss_d, grad_d, logits_d = (_relative(np.asarray(got), want) for got, want in pairs)
    return Difference(batch=batch, tokens=tokens, loss=loss_d, grad=grad_d, logits=logits_d)


def _relative(got: NDArray[np.float32], want: NDArray[np.float32]) -> float:
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))
