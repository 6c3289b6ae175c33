"""A row of `benchmarks.device` as one process that takes training steps, or trains a whole local round.

Full rows of random tokens, one thread. Cached steps read what lies below the trained blocks from files; the
first, which fills them, is reported apart. Steps that are not cached compute it each time. Memory and CPU
time of a round are those of its whole process.
"""

from __future__ import annotations

import multiprocessing
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from benchmarks.device_rows import Row

if TYPE_CHECKING:
    from edge_client.activations import Activations
    from edge_client.bundle import Bundle
    from edge_client.frozen_prefix import FrozenPrefix
    from edge_client.runtime import Runtime

__all__ = ["ROUND_STEPS", "inputs", "measured", "peak_mb", "timed"]

ROUND_STEPS = 10
WORDS = "the light music alarm bank weather today call play stop for set car home time day"

Inputs = dict[str, NDArray[Any]]


def measured(row: Row, bundle: Path, seed: int, steps: int) -> dict[str, float]:
    """A fresh process, so that peak memory is that of one runtime alone."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_measure, (msgspec.json.encode(row), bundle, seed, steps))


def _measure(encoded: bytes, bundle: Path, seed: int, steps: int) -> dict[str, float]:
    row = msgspec.json.decode(encoded, type=Row)
    if row.runtime in ("torch", "peft"):
        from benchmarks.device_torch import torch_row

        return torch_row(row, bundle, seed, steps)
    with tempfile.TemporaryDirectory() as directory:
        return (_step if row.part == "step" else _round)(row, bundle, Path(directory), seed, steps)


def peak_mb() -> float:
    """The most memory that this process has had resident, in 10^6 bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


def timed(step: Callable[[], float], steps: int) -> dict[str, float]:
    """Median CPU time of a step of this process after one to warm up, and the process's peak memory."""
    began = time.process_time()
    loss, times = step(), []
    first_ms = (time.process_time() - began) * 1e3
    for _ in range(steps):
        began = time.process_time()
        step()
        times.append((time.process_time() - began) * 1e3)
    return {"cpu_ms": statistics.median(times), "first_cpu_ms": first_ms, "loss": loss, "peak_mb": peak_mb()}


def inputs(bundle: Path, row: Row, seed: int) -> Inputs:
    """theta away from its start, and one batch of full rows."""
    from edge_client.bundle import open_bundle
    from fedtt.adapter import initial_theta

    manifest = open_bundle(bundle).manifest
    rng = np.random.default_rng(seed)
    theta = initial_theta(manifest.adapter, seed)
    shape = (row.batch, row.tokens)
    return {
        "theta": theta + rng.normal(0, 0.05, theta.shape).astype(np.float32),
        "ids": rng.integers(0, manifest.model.vocabulary, shape),
        "mask": np.ones(shape, np.int64),
        "labels": rng.integers(0, len(manifest.labels), row.batch),
    }


# edge runtimes


def _opened(row: Row, bundle: Path) -> tuple[Bundle, Runtime]:
    from edge_client.bundle import open_bundle
    from edge_client.executorch_runtime import ExecutorchRuntime
    from edge_client.onnx_runtime import OnnxRuntime

    if row.runtime == "executorch":
        opened = open_bundle(bundle, "executorch")
        return opened, ExecutorchRuntime(opened)
    opened = open_bundle(bundle)
    return opened, OnnxRuntime(opened)


def _kept(row: Row, directory: Path) -> Activations | None:
    from edge_client.activations import FileActivations

    return FileActivations(directory, 1 << 28) if row.cached else None


def _step(row: Row, bundle: Path, directory: Path, seed: int, steps: int) -> dict[str, float]:
    from edge_client.frozen_prefix import FrozenPrefix
    from edge_client.tokens import Batch

    opened, runtime = _opened(row, bundle)
    found = inputs(bundle, row, seed)
    theta = found["theta"]
    batch = Batch(ids=found["ids"], mask=found["mask"], labels=found["labels"])
    if row.depth is None:
        return timed(lambda: runtime.gradient(theta, batch)[0], steps)
    prefix = FrozenPrefix(runtime, opened, row.depth, _kept(row, directory), [batch])
    times = timed(lambda: prefix.gradient(theta, batch)[0], steps)
    counts = {"computed": prefix.computed, "reused": prefix.reused}
    if not row.cached:
        return times | counts
    return times | counts | {"fill_cpu_ms": _fill_ms(prefix, row, bundle, seed) - times["cpu_ms"]}


def _fill_ms(prefix: FrozenPrefix, row: Row, bundle: Path, seed: int) -> float:
    """CPU time of a step whose rows are all new, computed and written, once the graph below is open."""
    from edge_client.tokens import Batch

    theta = inputs(bundle, row, seed)["theta"]
    for turn in range(1, 3):
        new = inputs(bundle, row, seed + turn)
        batch = Batch(ids=new["ids"], mask=new["mask"], labels=new["labels"])
        began = time.process_time()
        prefix.gradient(theta, batch)
    return (time.process_time() - began) * 1e3


def _round(row: Row, bundle: Path, directory: Path, seed: int, _steps: int) -> dict[str, float]:
    """A process that opens a bundle, trains one plan on two batches of examples and codes its update."""
    from edge_client.examples import Example, Shard
    from edge_client.tokens import Tokens
    from edge_client.trainer import TrainingRequest, train
    from fedtt.adapter import initial_theta
    from fedtt.algorithms import FedTT
    from fedtt.codec import CodecSpec
    from fedtt.messages import Plan
    from fedtt.optimiser import TrainingSpec
    from fedtt.wire import encode_theta, version_digest

    opened, runtime = _opened(row, bundle)
    adapter, labels = opened.manifest.adapter, len(opened.manifest.labels)
    lowest = adapter.layers - (adapter.layers if row.depth is None else row.depth)
    blocks = [adapter.block_of(index) for index in range(len(adapter.layout.factors))]
    words, rng = WORDS.split(), np.random.default_rng(seed)
    width = row.tokens - 2  # and two that mark the ends
    texts = [" ".join(rng.choice(words, width)) for _ in range(2 * row.batch)]
    version = encode_theta(initial_theta(adapter, seed))
    plan = Plan(
        task="benchmark",
        seed=seed,
        bundle=opened.digest,
        version=version_digest(version),
        version_number=0,
        round=1,
        live=tuple(i for i, block in enumerate(blocks) if block is None or block >= lowest),
        training=TrainingSpec(local_steps=ROUND_STEPS, batch_size=row.batch),
        codec=CodecSpec(quantise="int4", error_feedback=True),
        method=FedTT(),
        min_examples=1,
    )
    request = TrainingRequest(
        plan=plan,
        device="0" * 32,
        bundle=opened,
        version=version,
        examples=Shard([Example(text, n % labels) for n, text in enumerate(texts)]),
        activations=_kept(row, directory),
    )
    began = time.process_time()
    update = train(request, Tokens(opened), runtime)
    return {
        "cpu_s": time.process_time(),
        "training_cpu_s": time.process_time() - began,
        "peak_mb": peak_mb(),
        "computed": update.prefixes_computed,
        "reused": update.prefixes_reused,
        "loss": update.header.loss_last,
    }
