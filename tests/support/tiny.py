"""A tiny manifest without graphs behind it, for tests of everything that never runs a model."""

from __future__ import annotations

import hashlib

import numpy as np

from aggregator.lifecycle import Lifecycle
from fedtt.adapter import AdapterSpec
from fedtt.manifest import (
    FileEntry,
    Graphs,
    Manifest,
    ModelInfo,
    Tokenization,
    bundle_digest,
    encode_manifest,
)
from fedtt.planning import plan_adapter, plan_head, plan_tt
from fedtt.task import TaskSpec
from fedtt.wire import encode_theta, version_digest
from storage.records import Bundle, Task
from storage.store import Transaction

__all__ = ["add_task", "tiny_manifest", "tiny_spec"]


def tiny_spec() -> AdapterSpec:
    head = plan_head("dense", hidden=8, labels=2)
    return plan_adapter(plan_tt(hidden=8, bottleneck=4, rank=2), hidden=8, layers=1, head=head)


def tiny_manifest() -> Manifest:
    """Well-formed; its files' hashes are those of their names."""
    spec = tiny_spec()
    names = ("step.onnx", "eval.onnx", "base.bin", "tokenizer.json", "factors.safetensors")
    return Manifest(
        task="sequence-classification",
        model=ModelInfo(name="tiny", architecture="bert", base_sha256="0" * 64, vocabulary=10),
        adapter=spec,
        layout_sha256=spec.layout.digest,
        labels=("no", "yes"),
        tokenization=Tokenization(file="tokenizer.json", pad_id=0, min_tokens=3, max_tokens=16),
        graphs={"onnxruntime": Graphs(step="step.onnx", eval="eval.onnx", weights=("base.bin",))},
        opset=20,
        requires={"onnxruntime": "1.20"},
        initial="factors.safetensors",
        files={n: FileEntry(hashlib.sha256(n.encode()).hexdigest(), len(n)) for n in names},
    )


def add_task(tx: Transaction, spec: TaskSpec, now: float = 0.0, described: Manifest | None = None) -> Task:
    """A task on the tiny bundle, or another, with version 0 all zero."""
    described = described or tiny_manifest()
    manifest = encode_manifest(described)
    bundle = bundle_digest(manifest)
    tx.put_bundle(Bundle(sha256=bundle, manifest=manifest, added_at=now))
    theta = np.zeros(described.adapter.layout.size, np.float32)
    first = version_digest(encode_theta(theta))
    return Lifecycle.create(tx, now, spec, bundle, first, draw_key=f"{spec.seed:032x}")
