"""Graph and torch side by side: the same theta and batches, several shapes, seen and unseen in tracing."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

import numpy as np
import onnxruntime
import torch
from msgspec import Struct
from numpy.typing import NDArray
from torch import Tensor, nn

from fedtt.errors import BundleError
from fedtt.graph_file import check_graph
from fedtt.manifest import Graphs, Manifest, Products
from fedtt.program_file import check_program
from fedtt.weights_file import stored_data

from .base import load_base
from .bundle import read_bundle
from .depths import PrefixStep, StepAbove, cut_inputs
from .inputs import TRACED, random_inputs
from .private import PrivateStep, private_inputs
from .request import RuntimeKind
from .step import AdaptedModel, TrainingStep
from .trace import MIN_TOKENS

__all__ = ["TOLERANCE", "Difference", "tolerance", "verify_bundle", "verify_graphs"]

TOLERANCE = 1e-5  #: largest allowed ‖graph - torch‖ / ‖torch‖
#: The same where products are of integers: a number rounded the other way moves others, block by block
#: (MiniLM-L6: 1e-6, or up to 0.04), though by less than rounding itself moves gradients.
_INTEGER_TOLERANCE = 0.1


class Difference(Struct, frozen=True, kw_only=True):
    """How far the graphs are from torch on one shape, ‖graph - torch‖ / ‖torch‖ of each output."""

    runtime: str
    batch: int
    tokens: int
    loss: float
    grad: float
    logits: float
    hidden: float = 0.0  #: the largest of all prefixes
    above: float = 0.0  #: the largest of losses and gradients of all steps over them
    private: float = 0.0  #: the larger of loss and gradient of the step that clips
    allowed: float = TOLERANCE  #: of each

    @property
    def largest(self) -> float:
        return max(self.loss, self.grad, self.logits, self.hidden, self.above, self.private)

    def line(self) -> str:
        """For people; says whether tracing saw this shape."""
        seen = "traced" if (self.batch, self.tokens) == TRACED else "unseen"
        return (
            f"{self.batch:>2} x {self.tokens:<4} {seen}  "
            f"loss {self.loss:.1e}  grad {self.grad:.1e}  logits {self.logits:.1e}  "
            f"hidden {self.hidden:.1e}  above {self.above:.1e}  private {self.private:.1e}  {self.runtime}"
        )


def tolerance(products: Products) -> float:
    """The largest allowed ‖graph - torch‖ / ‖torch‖."""
    return TOLERANCE if products == "fp32" else _INTEGER_TOLERANCE


def verify_bundle(directory: Path, model: str) -> tuple[Difference, ...]:
    """Compare a bundle's graphs with the model it was made from; raises BundleError where they differ."""
    manifest = read_bundle(directory)
    base = load_base(model, manifest.task, manifest.model.precision, manifest.model.products)
    if base.sha256 != manifest.model.base_sha256:
        raise BundleError(
            f"{directory} was made from other weights than {model} holds; "
            f"give the model {manifest.model.name!r} that it was exported from"
        )
    return verify_graphs(directory, manifest, AdaptedModel(base, manifest.adapter, manifest.labels))


def verify_graphs(directory: Path, manifest: Manifest, model: AdaptedModel) -> tuple[Difference, ...]:
    """The difference on each shape, from the shortest rows to the longest; raises past `tolerance`, and for
    graphs that devices refuse.
    """
    longest = manifest.tokenization.max_tokens
    shapes = [(b, min(s, longest)) for b, s in (TRACED, (1, MIN_TOKENS), (5, 17), (2, 64), (4, longest))]
    differences: tuple[Difference, ...] = ()
    for runtime, graphs in manifest.graphs.items():
        load = _onnxruntime if runtime == "onnxruntime" else _executorch(directory / graphs.weights[0])
        if runtime == "executorch":
            stored_data((directory / graphs.weights[0]).read_bytes(), graphs.weights[0])
        parts = tuple(_parts(graphs, model))
        for part in parts:
            data = (directory / part.file).read_bytes()
            if runtime == "onnxruntime":
                check_graph(data, part.file, graphs.weights)
            else:
                check_program(data, part.file)
        differences += _compared(
            runtime, ((load(directory / part.file), part) for part in parts), shapes, model
        )
    for difference in differences:
        if not difference.largest <= difference.allowed:
            raise BundleError(
                f"{directory}: graph and torch differ by {difference.largest:.1e} on a batch of "
                f"{difference.batch} x {difference.tokens} tokens in {difference.runtime}, "
                f"at most {difference.allowed:.0e} is allowed; do not use this bundle, and report the model"
            )
    return differences


# what is compared


@dataclass(frozen=True, kw_only=True)
class _Part:
    """One graph of a bundle beside the function that it was compiled from."""

    file: str
    function: nn.Module
    inputs: Callable[[int, int], dict[str, Tensor]]  #: of a batch and a number of tokens, in their order
    outputs: dict[str, str]  #: in their order, each with the figure of Difference that it counts to


def _parts(graphs: Graphs, model: AdaptedModel) -> Iterator[_Part]:
    every = partial(random_inputs, model)

    def forward(batch: int, tokens: int) -> dict[str, Tensor]:
        inputs = every(batch, tokens)
        return {name: inputs[name] for name in PrefixStep.inputs}

    outputs = {"loss": "loss", "grad": "grad"}
    yield _Part(file=graphs.step, function=TrainingStep(model), inputs=every, outputs=outputs)
    yield _Part(file=graphs.eval, function=model, inputs=forward, outputs={"logits": "logits"})
    if graphs.private is not None:
        outputs, clipping = {"loss": "private", "grad": "private"}, partial(private_inputs, model)
        yield _Part(file=graphs.private, function=PrivateStep(model), inputs=clipping, outputs=outputs)
    for cut in graphs.depths:
        prefix, above = PrefixStep(model, cut.depth), StepAbove(model, cut.depth)
        yield _Part(file=cut.prefix, function=prefix, inputs=forward, outputs={"hidden": "hidden"})
        upper = partial(cut_inputs, prefix, above)
        outputs = {"loss": "above", "grad": "above"}
        yield _Part(file=cut.step, function=above, inputs=upper, outputs=outputs)


def _compared(
    runtime: RuntimeKind,
    parts: Iterable[tuple[_Run, _Part]],
    shapes: Sequence[tuple[int, int]],
    model: AdaptedModel,
) -> tuple[Difference, ...]:
    """Of each shape; one graph is loaded at a time, since each may hold the base and buffers of its own."""
    found: list[dict[str, float]] = [{} for _ in shapes]
    for run, part in parts:
        for figures, (batch, tokens) in zip(found, shapes, strict=True):
            inputs = part.inputs(batch, tokens)
            with torch.no_grad(), model.products(runtime):
                results = part.function(*inputs.values())
            expected = (results if isinstance(results, tuple) else (results,))[: len(part.outputs)]
            given = run(inputs, part.outputs)
            for figure, got, want in zip(part.outputs.values(), given, expected, strict=True):
                figures[figure] = max(figures.get(figure, 0.0), _relative(got, want.numpy()))
    allowed = tolerance(model.base.products)
    return tuple(
        Difference(runtime=runtime, batch=batch, tokens=tokens, allowed=allowed, **figures)
        for figures, (batch, tokens) in zip(found, shapes, strict=True)
    )


def _relative(got: NDArray[np.float32], want: NDArray[np.float32]) -> float:
    """‖got - want‖ / ‖want‖."""
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


# runtimes


class _Run(Protocol):
    """One loaded graph."""

    def __call__(
        self, inputs: Mapping[str, Tensor], outputs: Iterable[str], /
    ) -> Sequence[NDArray[np.float32]]: ...


def _onnxruntime(path: Path) -> _Run:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda inputs, outputs: session.run(
        list(outputs), {name: value.numpy() for name, value in inputs.items()}
    )


def _executorch(weights: Path) -> Callable[[Path], _Run]:
    """ExecuTorch's own bindings, which need torch: devices reach the same kernels without it."""
    try:
        with warnings.catch_warnings():  # it calls itself experimental
            warnings.simplefilter("ignore")
            from executorch.extension.pybindings.portable_lib import _load_for_executorch
    except ImportError as error:
        raise BundleError(f"{weights} cannot be verified ({error}): docs/executorch.md says how") from None

    def load(path: Path) -> _Run:
        program = _load_for_executorch(str(path), str(weights))
        return lambda inputs, _: [found.numpy() for found in program.forward(list(inputs.values()))]

    return load
