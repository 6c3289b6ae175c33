"""From a request to a bundle: load, insert, trace, convert, compare, publish."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

from safetensors.numpy import save_file

from fedtt.adapter import AdapterSpec, initial_theta
from fedtt.errors import ConfigError
from fedtt.graph_file import OPERATORS, graph_needs
from fedtt.manifest import MANIFEST, Graphs, Manifest, ModelInfo, Tokenization, encode_manifest

from .base import Base, load_base
from .bundle import check_target, file_entries, staged
from .compiling import compiling, does_not_compile
from .depths import cut_graphs, step_above
from .executorch_graphs import EXECUTORCH, executorch_graphs
from .inputs import TRACED, random_inputs
from .private import private_step
from .request import ExportRequest, RuntimeKind
from .step import AdaptedModel, TrainingStep
from .stored_in_graphs import store
from .summary import Summary, summarise
from .to_onnx import OPSET, STEP_OUTPUTS, convert, part_of, write_graphs
from .trace import MIN_TOKENS, trace
from .verify import verify_graphs

__all__ = ["export_bundle"]

_STEP, _EVAL, _PRIVATE, _WEIGHTS = "step.onnx", "eval.onnx", "private.onnx", "base.bin"
_REQUIRES: dict[RuntimeKind, str] = {"onnxruntime": "1.20", "executorch": EXECUTORCH}
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
    base = load_base(request.model, request.task, request.base, request.products)
    if not MIN_TOKENS <= request.max_tokens <= base.longest:
        raise ConfigError("max_tokens", request.max_tokens, f"from {MIN_TOKENS} to {base.longest}")
    spec = request.plan(hidden=base.hidden, layers=len(base.blocks), projections=base.projections)
    model = AdaptedModel(base, spec, request.labels)
    with staged(out) as stage:
        graphs: dict[RuntimeKind, Graphs] = {"onnxruntime": _write_graphs(model, request, stage, report)}
        if "executorch" in request.runtimes:
            report("lowering the step to ExecuTorch (minutes)")
            depths = request.cut_depths(spec)
            graphs["executorch"] = executorch_graphs(
                model, depths, request.max_tokens, stage, private=request.private
            )
        base.tokenizer.enable_truncation(request.max_tokens)
        base.tokenizer.save(str(stage / _TOKENIZER))
        save_file(spec.layout.unflatten(initial_theta(spec, request.seed)), stage / _FACTORS)
        manifest = _manifest(request, base, spec, graphs, stage)
        report("comparing the graphs with torch" if verify else "writing")
        differences = verify_graphs(stage, manifest, model) if verify else ()
        (stage / MANIFEST).write_bytes(encode_manifest(manifest))
    return summarise(manifest, base, differences)


def _write_graphs(
    model: AdaptedModel, request: ExportRequest, directory: Path, report: Callable[[str], None]
) -> Graphs:
    depths = request.cut_depths(model.spec)
    found = Graphs(
        step=_STEP,
        eval=_EVAL,
        private=_PRIVATE if request.private else None,
        weights=(_WEIGHTS,),
        depths=tuple(cut_graphs(model, depth, "onnx") for depth in depths),
    )
    report("tracing the training step")
    step = TrainingStep(model, [model.spec.layers - depth for depth in depths])
    inputs = random_inputs(model, *TRACED)
    with compiling(_STEP, "onnxruntime"):
        program = trace(step, inputs)
    report("converting it to ONNX")
    weights = dict(itertools.chain(model.named_parameters(), model.named_buffers()))
    hidden = {f"hidden-{depth}": ("batch", "tokens") for depth in depths}
    with compiling(_STEP, "onnxruntime"):
        whole = convert(program, list(inputs), weights, STEP_OUTPUTS | hidden)
    graphs = {_STEP: part_of(whole, "loss", "grad"), _EVAL: part_of(whole, "logits")}
    for cut in found.depths:
        report(f"compiling the step at depth {cut.depth}")
        graphs[cut.prefix] = part_of(whole, f"hidden-{cut.depth}")
        graphs[cut.prefix].graph.outputs[0].name = "hidden"
        with compiling(cut.step, "onnxruntime"):
            graphs[cut.step] = step_above(model, cut.depth, weights)
    if found.private is not None:
        report("compiling the step that clips each example's gradient")
        with compiling(found.private, "onnxruntime"):
            graphs[found.private] = private_step(model, weights)
    for graph in graphs.values():
        store(graph, model.stored)
    write_graphs(graphs, _WEIGHTS, directory)
    for name in graphs:
        if foreign := graph_needs((directory / name).read_bytes(), name).operators - OPERATORS:
            operator = ".".join(filter(None, min(foreign)))
            raise does_not_compile(name, "onnxruntime", f"has {operator}, which devices do not run")
    return found


def _manifest(
    request: ExportRequest,
    base: Base,
    spec: AdapterSpec,
    graphs: dict[RuntimeKind, Graphs],
    directory: Path,
) -> Manifest:
    return Manifest(
        task=request.task,
        model=ModelInfo(
            name=base.name,
            architecture=base.config.model_type,
            base_sha256=base.sha256,
            vocabulary=int(base.config.vocab_size),
            precision=base.precision,
            products=base.products,
        ),
        adapter=spec,
        layout_sha256=spec.layout.digest,
        labels=request.labels,
        tokenization=Tokenization(
            file=_TOKENIZER, pad_id=base.pad_id, min_tokens=MIN_TOKENS, max_tokens=request.max_tokens
        ),
        graphs=graphs,
        opset=OPSET,
        requires={runtime: _REQUIRES[runtime] for runtime in graphs},
        initial=_FACTORS,
        files=file_entries(directory),
    )
