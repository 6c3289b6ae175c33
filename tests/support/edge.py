"""What tests of the edge client share: a small bundle on disk and a model that needs no graph."""

from __future__ import annotations

import hashlib
import json
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from msgspec.structs import replace
from numpy.typing import NDArray
from safetensors.numpy import save
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from edge_client.bundle import Bundle, RuntimeName
from edge_client.home import Home
from edge_client.runtime import Hidden
from edge_client.tokens import Batch
from fedtt.layout import Theta
from fedtt.manifest import MANIFEST, FileEntry, Manifest, bundle_digest, encode_manifest
from tests.support.tiny import tiny_manifest, tiny_spec

__all__ = [
    "Living",
    "MeanTarget",
    "WholeSteps",
    "living_tokenizers",
    "locked_home",
    "panicking_tokenizer",
    "small_bundle",
    "write_small_bundle",
]

WORDS = ("[PAD]", "[UNK]", "lights", "on", "off", "please", "now")


class WholeSteps:
    """The part of a Runtime that has no graphs of smaller depths."""

    name: RuntimeName = "onnxruntime"
    depths: tuple[int, ...] = ()
    rows: int | None = None

    def prefix(self, theta: Theta, batch: Batch, depth: int) -> Hidden:
        raise NotImplementedError

    def gradient_above(self, theta: Theta, hidden: Hidden, batch: Batch, depth: int) -> tuple[float, Theta]:
        raise NotImplementedError

    def release(self) -> None:
        """There is nothing to free."""

    def private_gradient(
        self, theta: Theta, batch: Batch, live: NDArray[np.float32], clip: float
    ) -> tuple[float, Theta]:
        raise NotImplementedError


class MeanTarget(WholeSteps):
    """A Runtime with the loss ½‖θ − t‖², t from the batch's mean label: gradients are known exactly."""

    def __init__(self) -> None:
        self.batches: list[Batch] = []

    def target(self, batch: Batch) -> Theta:
        assert batch.labels is not None
        value = np.float32(batch.labels.mean())
        return np.linspace(value, 1, tiny_spec().layout.size, dtype=np.float32)

    def gradient(self, theta: Theta, batch: Batch) -> tuple[float, Theta]:
        self.batches.append(batch)
        grad = theta - self.target(batch)
        return float(0.5 * grad @ grad), grad

    def logits(self, theta: Theta, batch: Batch) -> NDArray[np.float32]:
        return np.zeros((len(batch.ids), 2), np.float32)


class SlowTarget(MeanTarget):
    """The same, whose batches wait for a word."""

    def __init__(self) -> None:
        super().__init__()
        self.begun, self.go_on = threading.Event(), threading.Event()

    def gradient(self, theta: Theta, batch: Batch) -> tuple[float, Theta]:
        self.begun.set()
        self.go_on.wait(10)
        return super().gradient(theta, batch)


def panicking_tokenizer() -> bytes:
    """One at which the library's Rust panics: its merges are shorter than what they begin with."""
    model = {"type": "BPE", "continuing_subword_prefix": "####", "vocab": {"a": 0, "b": 1, "ab": 2}}
    return json.dumps({"version": "1.0", "model": {**model, "merges": ["a b"]}}).encode()


def write_small_bundle(
    directory: Path, base_bytes: int = 300_000, tokenizer_file: bytes | None = None
) -> str:
    """A bundle with a real tokenizer, first factors all zero and a base of random bytes; -> its name.

    Its graphs are never loaded.
    """
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    layout = tiny_spec().layout
    contents = {
        "step.onnx": b"step",
        "eval.onnx": b"eval",
        "base.bin": np.random.default_rng(0).bytes(base_bytes),
        "tokenizer.json": tokenizer_file or tokenizer.to_str().encode(),
        "factors.safetensors": save(layout.unflatten(np.zeros(layout.size, np.float32))),
    }
    files = {n: FileEntry(hashlib.sha256(data).hexdigest(), len(data)) for n, data in contents.items()}
    for name, data in contents.items():
        (directory / name).write_bytes(data)
    manifest = encode_manifest(replace(tiny_manifest(), files=files))
    (directory / MANIFEST).write_bytes(manifest)
    return bundle_digest(manifest)


def small_bundle(directory: Path, **changes: object) -> Bundle:
    """The same, opened; `changes` are made to its manifest in memory alone."""
    digest = write_small_bundle(directory, base_bytes=10)
    manifest: Manifest = replace(tiny_manifest(), **changes)
    return Bundle(directory=directory, digest=digest, manifest=manifest)


@contextmanager
def locked_home(directory: Path) -> Iterator[Home]:
    home = Home(directory)
    with home.lock():
        yield home


class Living:
    """The tokenizers that are in memory."""

    def __init__(self) -> None:
        self.read: list[str] = []  #: files, in their order
        self._now = weakref.WeakSet[_Seen]()

    @property
    def count(self) -> int:
        return len(self._now)

    def from_file(self, path: str) -> _Seen:
        self.read.append(path)
        seen = _Seen(Tokenizer.from_file(path))
        self._now.add(seen)
        return seen


class _Seen:
    """A tokenizer as it is, of which it can be told when it goes."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)


@contextmanager
def living_tokenizers() -> Iterator[Living]:
    """Those that are read meanwhile."""
    living = Living()
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("tokenizers.Tokenizer", living)
        yield living
