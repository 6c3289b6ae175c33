"""From a request to a bundle: load, insert, trace, convert, compare, publish."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

from safetensors.numpy import save_file

from fedtt.adapter import AdapterSpec, initial_theta
from fedtt.errors import ConfigError
from fedtt.manifest import MANIFEST, Graphs, Manifest, ModelInfo, Tokenization, encode_manifest

from .base import Base, load_base
from .bundle import check_target, file_entries, staged
from .request import ExportRequest
from .step import AdaptedModel, TrainingStep
from .summary import Summary, summarise
from .to_onnx import OPSET, convert, split_graphs, write_graphs
from .trace import MIN_TOKENS, trace
from .verify import TRACED, random_inputs, verify_graphs

__all__ = ["export_bundle"]

_STEP, _EVAL, _WEIGHTS = "step.onnx", "eval.onnx", "base.bin"
_TOKENIZER, _FACTORS = "tokenizer.json", "factors.safetensors"


def export_bundle(
    request: ExportRequest,
    out: Path,
    *,
    force: bool = False,
    verify: bool = True,
    report: Callable[[str], None] = lambda stage: None,
) -> Summary:
    """Compile the training step that `request` asks for into the bundle directory `out`.

    The same request gives the same bytes. `out` appears whole, after its graphs have been compared with
    torch, or stays as it was. `report` is told of each stage.  Raises ConfigError for what cannot be
    exported, BundleError where graph and torch differ, StorageError where `out` cannot be written.
    """
    check_target(out, force=force)
    report(f"loading {request.model}")
    base = load_base(request.model, request.task)
    if not MIN_TOKENS <= request.max_tokens <= base.longest:
        raise ConfigError("max_tokens", request.max_tokens, f"from {MIN_TOKENS} to {base.longest}")
    spec = request.plan(hidden=base.hidden, layers=len(base.blocks), projections=base.projections)
    model = AdaptedModel(base, spec, request.labels)
    with staged(out) as stage:
        _write_graphs(model, stage, report)
        base.tokenizer.enable_truncation(request.max_tokens)
        base.tokenizer.save(str(stage / _TOKENIZER))
        save_file(spec.layout.unflatten(initial_theta(spec, request.seed)), stage / _FACTORS)
        manifest = _manifest(request, base, spec, stage)
        report("comparing the graphs with torch" if verify else "writing")
        differences = verify_graphs(stage, manifest, model) if verify else ()
        (stage / MANIFEST).write_bytes(encode_manifest(manifest))
    return summarise(manifest, base, differences)


def _write_graphs(model: AdaptedModel, directory: Path, report: Callable[[str], None]) -> None:
    report("tracing the training step")
    inputs = random_inputs(model, *TRACED)
    program = trace(TrainingStep(model), inputs)
    report("converting it to ONNX")
    weights = dict(itertools.chain(model.named_parameters(), model.named_buffers()))
    step, evaluation = split_graphs(convert(program, list(inputs), weights))
    write_graphs({_STEP: step, _EVAL: evaluation}, _WEIGHTS, directory)


def _manifest(request: ExportRequest, base: Base, spec: AdapterSpec, directory: Path) -> Manifest:
    return Manifest(
        task=request.task,
        model=ModelInfo(
            name=base.name,
            architecture=base.config.model_type,
            base_sha256=base.sha256,
            vocabulary=int(base.config.vocab_size),
        ),
        adapter=spec,
        layout_sha256=spec.layout.digest,
        labels=request.labels,
        tokenization=Tokenization(
            file=_TOKENIZER, pad_id=base.pad_id, min_tokens=MIN_TOKENS, max_tokens=request.max_tokens
        ),
        graphs={"onnxruntime": Graphs(step=_STEP, eval=_EVAL, weights=(_WEIGHTS,))},
        opset=OPSET,
        requires={"onnxruntime": "1.20"},
        initial=_FACTORS,
        files=file_entries(directory),
    )
