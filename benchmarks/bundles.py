"""Bundles whose graphs are never loaded: a head of any size, for benchmarks of everything but training."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
from safetensors.numpy import save

from edge_client.bundle import Bundle
from fedtt.adapter import AdapterSpec
from fedtt.kinds import HeadOnly, HeadSpec
from fedtt.manifest import (
    MANIFEST,
    FileEntry,
    Graphs,
    Manifest,
    ModelInfo,
    Tokenization,
    bundle_digest,
    encode_manifest,
)

__all__ = ["LABELS", "bundle_of", "head_of"]

LABELS = 10


def head_of(numbers: int) -> AdapterSpec:
    """A dense head of so many trained numbers, a multiple of 10 from 20 on."""
    head = HeadSpec(kind="dense", labels=LABELS)
    adapter = AdapterSpec(
        hidden=numbers // LABELS - 1, layers=1, depth=0, inserted=HeadOnly(), head=head
    )  # h·10 weights + 10 biases
    assert adapter.layout.size == numbers
    return adapter


def bundle_of(directory: Path, numbers: int) -> Bundle:
    """Write a bundle of so many trained numbers, all zero at first."""
    adapter = head_of(numbers)
    contents = {
        "step.onnx": b"step",
        "eval.onnx": b"eval",
        "tokenizer.json": b"{}",
        "factors.safetensors": save(adapter.layout.unflatten(np.zeros(numbers, np.float32))),
    }
    manifest = Manifest(
        task="sequence-classification",
        model=ModelInfo(name="none", architecture="bert", base_sha256="0" * 64, vocabulary=10),
        adapter=adapter,
        layout_sha256=adapter.layout.digest,
        labels=tuple(map(str, range(LABELS))),
        tokenization=Tokenization(file="tokenizer.json", pad_id=0, min_tokens=1, max_tokens=16),
        graphs={"onnxruntime": Graphs(step="step.onnx", eval="eval.onnx", weights=())},
        opset=20,
        requires={},
        initial="factors.safetensors",
        files={n: FileEntry(hashlib.sha256(data).hexdigest(), len(data)) for n, data in contents.items()},
    )
    data = encode_manifest(manifest)
    directory.mkdir(parents=True, exist_ok=True)
    for name, content in {**contents, MANIFEST: data}.items():
        (directory / name).write_bytes(content)
    return Bundle(directory=directory, digest=bundle_digest(data), manifest=manifest)
