"""Graphs for emulating many devices at once, compiled on demand into a directory beside a bundle.

No device downloads them. Their weights are those in the bundle's directory.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from pathlib import Path

import msgspec
import numpy as np
import onnx_ir as ir
import onnxruntime
import torch
from torch import Tensor

from fedtt.errors import BundleError
from fedtt.manifest import MANIFEST, bundle_digest

from .base import load_base
from .bundle import read_bundle, staged
from .devices import DevicesStep
from .emulation_files import (
    DEVICES,
    PREFIX,
    STAMP,
    EmulationFiles,
    emulation_directory,
    open_emulation,
    open_session,
)
from .inputs import random_inputs
from .prefix import Prefix
from .step import AdaptedModel
from .stored_in_graphs import store
from .to_onnx import convert, share_weights
from .trace import AXES, trace
from .verify import tolerance

__all__ = ["compile_emulation", "random_rows"]

_AXES: dict[str, tuple[str, ...]] = {
    **AXES,
    "theta": ("devices",),
    "device": ("batch",),
    "weight": ("batch",),
    "hidden": ("batch", "tokens"),
}
_IDS = ("ids", "mask")
_TRACED = (4, 7, 11)  #: devices, rows and tokens of the example that is traced
_COMPARED = ((1, 5, 9), (6, 9, 13))  #: likewise, of those that torch and the graphs are compared on


def compile_emulation(
    bundle: Path, model: str, report: Callable[[str], None] = lambda stage: None
) -> tuple[Path, EmulationFiles]:
    """The directory with the graphs of a bundle, compiled from the model it was exported from if need be.

    Raises BundleError where the model is another one, or where graphs and torch differ.
    """
    out = emulation_directory(bundle)
    digest = bundle_digest((bundle / MANIFEST).read_bytes())
    if found := open_emulation(out, digest):
        return out, found
    manifest = read_bundle(bundle)
    report(f"loading {model}")
    base = load_base(model, manifest.task, manifest.model.precision, manifest.model.products)
    if base.sha256 != manifest.model.base_sha256:
        raise BundleError(f"{bundle} was made from other weights than {model} holds; name the model it is of")
    adapted = AdaptedModel(base, manifest.adapter, manifest.labels)
    files = EmulationFiles(bundle=digest, cut=manifest.adapter.blocks.start)
    source = bundle / manifest.graphs["onnxruntime"].step
    with staged(out) as stage:
        report("tracing the step of many devices")
        share_weights(_graphs(adapted, files.cut), source, stage)
        report("comparing the graphs with torch")
        _compare(adapted, files.cut, stage, bundle)
        (stage / STAMP).write_bytes(msgspec.json.encode(files))
    return out, files


def random_rows(step: DevicesStep, devices: int, rows: int, tokens: int) -> dict[str, Tensor]:
    """Inputs of a step by name, in its order; each device has other factors, each row another length."""
    inputs = random_inputs(step.model, rows, tokens)
    moved = torch.linspace(0.5, 1.0, devices)[:, None] * inputs["theta"]  # larger ones would amplify rounding
    if step.cut:
        with torch.no_grad():
            inputs["hidden"] = Prefix(step.model.base, step.cut)(inputs["ids"], inputs["mask"])
    inputs |= {"theta": moved, "device": torch.arange(rows) % devices, "weight": torch.linspace(0.1, 1, rows)}
    return {name: inputs[name] for name in step.inputs}


def _graphs(model: AdaptedModel, cut: int) -> dict[str, ir.Model]:
    weights = dict(itertools.chain(model.named_parameters(), model.named_buffers()))
    step = DevicesStep(model, cut)
    inputs = random_rows(step, *_TRACED)
    outputs: dict[str, tuple[str, ...]] = {"loss": ("batch",), "grad": ("devices",)}
    graphs = {DEVICES: convert(trace(step, inputs, _AXES), list(inputs), weights, outputs, _AXES)}
    if cut:
        prefix = Prefix(model.base, cut)
        ids = {name: value for name, value in random_inputs(model, *_TRACED[1:]).items() if name in _IDS}
        outputs = {"hidden": _AXES["hidden"]}
        graphs[PREFIX] = convert(trace(prefix, ids, _AXES), list(ids), weights, outputs, _AXES)
    for graph in graphs.values():
        store(graph, model.stored)
    return graphs


def _compare(model: AdaptedModel, cut: int, directory: Path, bundle: Path) -> None:
    """Raise BundleError where a graph and torch differ by more than is allowed of the base's products."""
    step, allowed = DevicesStep(model, cut), tolerance(model.base.products)
    for size in _COMPARED:
        inputs = random_rows(step, *size)
        with torch.no_grad(), model.products():
            loss, grad = step(*inputs.values())
        _check(open_session(directory / DEVICES, bundle), inputs, {"loss": loss, "grad": grad}, allowed)
        if cut:
            ids = {name: value for name, value in random_inputs(model, *size[1:]).items() if name in _IDS}
            with model.products():
                hidden = Prefix(model.base, cut)(*ids.values())
            _check(open_session(directory / PREFIX, bundle), ids, {"hidden": hidden}, allowed)


def _check(
    session: onnxruntime.InferenceSession,
    inputs: Mapping[str, Tensor],
    expected: Mapping[str, Tensor],
    allowed: float,
) -> None:
    found = session.run(list(expected), {name: value.numpy() for name, value in inputs.items()})
    for got, want in zip(found, expected.values(), strict=True):
        difference = float(np.linalg.norm(got - want.numpy()) / want.norm())
        if not difference <= allowed:
            raise BundleError(
                f"graph and torch differ by {difference:.1e} over many devices, at most {allowed:.0e} is "
                "allowed; report the model"
            )
