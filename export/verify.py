"""Graph and torch side by side: the same theta and batches, several shapes, seen and unseen in tracing."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from msgspec import Struct
from numpy.typing import NDArray
from torch import Tensor

from fedtt.errors import BundleError
from fedtt.manifest import Manifest

from .base import load_base
from .bundle import read_bundle
from .depths import PrefixStep, StepAbove
from .inputs import TRACED, random_inputs
from .step import AdaptedModel, TrainingStep
from .trace import MIN_TOKENS

__all__ = ["TOLERANCE", "Difference", "verify_bundle", "verify_graphs"]

TOLERANCE = 1e-5  #: largest allowed ‖graph - torch‖ / ‖torch‖


class Difference(Struct, frozen=True, kw_only=True):
    """How far the graphs are from torch on one shape, ‖graph - torch‖ / ‖torch‖ of each output."""

    runtime: str = "onnxruntime"
    batch: int
    tokens: int
    loss: float
    grad: float
    logits: float
    hidden: float = 0.0  #: the largest of all prefixes
    above: float = 0.0  #: the largest of losses and gradients of all steps over them

    @property
    def largest(self) -> float:
        return max(self.loss, self.grad, self.logits, self.hidden, self.above)

    def line(self) -> str:
        """For people; says whether tracing saw this shape."""
        seen = "traced" if (self.batch, self.tokens) == TRACED else "unseen"
        return (
            f"{self.batch:>2} x {self.tokens:<4} {seen}  "
            f"loss {self.loss:.1e}  grad {self.grad:.1e}  logits {self.logits:.1e}  "
            f"hidden {self.hidden:.1e}  above {self.above:.1e}  {self.runtime}"
        )


def verify_bundle(directory: Path, model: str) -> tuple[Difference, ...]:
    """Compare a bundle's graphs with the model it was made from; raises BundleError where they differ."""
    manifest = read_bundle(directory)
    base = load_base(model, manifest.task, manifest.model.precision)
    if base.sha256 != manifest.model.base_sha256:
        raise BundleError(
            f"{directory} was made from other weights than {model} holds; "
            f"give the model {manifest.model.name!r} that it was exported from"
        )
    return verify_graphs(directory, manifest, AdaptedModel(base, manifest.adapter, manifest.labels))


def verify_graphs(directory: Path, manifest: Manifest, model: AdaptedModel) -> tuple[Difference, ...]:
    """The difference on each shape, from the shortest rows to the longest; raises past TOLERANCE."""
    comparison = _Comparison(directory, manifest, model)
    longest = manifest.tokenization.max_tokens
    shapes = [TRACED, (1, MIN_TOKENS), (5, 17), (2, 64), (4, longest)]
    differences = tuple(comparison.on(batch, min(tokens, longest)) for batch, tokens in shapes)
    if "executorch" in manifest.graphs:
        run = _executorch(directory, manifest)
        differences += tuple(
            _on_executorch(run, model, batch, min(tokens, longest)) for batch, tokens in shapes
        )
    for difference in differences:
        if not difference.largest <= TOLERANCE:
            raise BundleError(
                f"{directory}: graph and torch differ by {difference.largest:.1e} on a batch of "
                f"{difference.batch} x {difference.tokens} tokens, at most {TOLERANCE:.0e} is allowed; "
                "do not use this bundle, and report the model"
            )
    return differences


def _session(path: Path) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


def _executorch(directory: Path, manifest: Manifest) -> Callable[[str, Iterable[Tensor]], list[Tensor]]:
    """ExecuTorch's own bindings, which need torch: devices reach the same kernels without it."""
    try:
        with warnings.catch_warnings():  # it calls itself experimental
            warnings.simplefilter("ignore")
            from executorch.extension.pybindings.portable_lib import _load_for_executorch
    except ImportError as error:
        raise BundleError(f"{directory} cannot be verified ({error}): docs/executorch.md says how") from None
    graphs = manifest.graphs["executorch"]
    weights = str(directory / graphs.weights[0])
    step, evaluation = (_load_for_executorch(str(directory / f), weights) for f in (graphs.step, graphs.eval))
    programs = {"step": step, "eval": evaluation}
    return lambda name, inputs: list(programs[name].forward(list(inputs)))


def _on_executorch(
    run: Callable[[str, Iterable[Tensor]], list[Tensor]], model: AdaptedModel, batch: int, tokens: int
) -> Difference:
    inputs = random_inputs(model, batch, tokens)
    with torch.no_grad():
        expected = TrainingStep(model)(*inputs.values())
    found = run("step", inputs.values()) + run("eval", [inputs[name] for name in ("theta", "ids", "mask")])
    pairs = zip(found, expected, strict=True)
    loss, grad, logits = (_relative(got.numpy(), want.numpy()) for got, want in pairs)
    return Difference(
        runtime="executorch",
        batch=batch,
        tokens=tokens,
        loss=loss,
        grad=grad,
        logits=logits,
        hidden=0.0,
        above=0.0,
    )


class _Comparison:
    """The graphs of a bundle for ONNX Runtime beside the functions they were compiled from."""

    def __init__(self, directory: Path, manifest: Manifest, model: AdaptedModel) -> None:
        files = manifest.graphs["onnxruntime"]
        self._model = model
        self._step, self._eval = (_session(directory / name) for name in (files.step, files.eval))
        self._cuts = [
            (
                PrefixStep(model, cut.depth),
                _session(directory / cut.prefix),
                StepAbove(model, cut.depth),
                _session(directory / cut.step),
            )
            for cut in files.depths
        ]

    def on(self, batch: int, tokens: int) -> Difference:
        inputs = random_inputs(self._model, batch, tokens)
        with torch.no_grad():
            loss, gradient, logits = TrainingStep(self._model)(*inputs.values())
        whole = _differences(self._step, inputs, {"loss": loss, "grad": gradient})
        names = ("theta", "ids", "mask")
        (evaluated,) = _differences(self._eval, {name: inputs[name] for name in names}, {"logits": logits})
        hidden = above = 0.0
        for prefix, prefix_graph, step, step_graph in self._cuts:
            lower = {name: inputs[name] for name in prefix.inputs}
            with torch.no_grad():
                entering = prefix(*lower.values())
                upper = {name: (inputs | {"hidden": entering})[name] for name in step.inputs}
                loss, gradient = step(*upper.values())
            hidden = max(hidden, *_differences(prefix_graph, lower, {"hidden": entering}))
            above = max(above, *_differences(step_graph, upper, {"loss": loss, "grad": gradient}))
        loss_d, grad_d = whole
        return Difference(
            batch=batch, tokens=tokens, loss=loss_d, grad=grad_d, logits=evaluated, hidden=hidden, above=above
        )


def _differences(
    session: onnxruntime.InferenceSession, inputs: Mapping[str, Tensor], expected: Mapping[str, Tensor]
) -> list[float]:
    """‖graph - torch‖ / ‖torch‖ of each output."""
    found = session.run(list(expected), {name: value.numpy() for name, value in inputs.items()})
    pairs = zip(found, expected.values(), strict=True)
    return [_relative(np.asarray(got), want.numpy()) for got, want in pairs]


def _relative(got: NDArray[np.float32], want: NDArray[np.float32]) -> float:
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))
