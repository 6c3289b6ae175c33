"""The rows of `benchmarks.device`: each one process that takes training steps, or trains a whole local round.

Full rows of random tokens, one thread. Cached steps read what lies below the trained blocks from files; the
first, which fills them, is reported apart. Steps that are not cached compute it each time. Torch eager
trains the same adapters with the base frozen, at the same depth and without a cache; LoRA is PEFT's on
query and value, with a dense head. Memory and CPU time of a round are those of its whole process.
"""

from __future__ import annotations

import itertools
import multiprocessing
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import msgspec
import numpy as np
from msgspec import Struct
from msgspec.structs import replace
from numpy.typing import NDArray

from benchmarks.harness import minilm_directory

if TYPE_CHECKING:
    from edge_client.activations import Activations
    from edge_client.bundle import Bundle
    from edge_client.runtime import Runtime

__all__ = ["BASES", "SHAPES", "Row", "has_limit", "matmul_gflops", "measured", "rows", "step_gflop"]

BASES = ("fp32", "fp16", "int8")
SHAPES = ((8, 64), (16, 128))
DEPTHS = (None, 3, 2, 1)
TURNS = 3  #: of fp32 steps; the others are taken once
LORA_RANK = 8
ROUND_STEPS = 10
WORDS = "the light music alarm bank weather today call play stop for set car home time day"

Part = Literal["step", "round"]
Kind = Literal["onnxruntime", "executorch", "torch", "peft"]
PARTS: tuple[Part, ...] = ("step", "round")
Inputs = dict[str, NDArray[Any]]


class Row(Struct, frozen=True, kw_only=True):
    """What one process does."""

    part: Part
    runtime: Kind
    base: str = "fp32"
    depth: int | None = None  #: blocks trained; None for all
    cached: bool = False  #: what lies below them is read from files
    batch: int
    tokens: int
    turn: int = 0


def rows(kinds: Sequence[Kind]) -> Iterator[Row]:
    """Those that are compared follow one another, so that the machine is the same to them."""
    for turn, (batch, tokens), part, depth in itertools.product(range(TURNS), SHAPES, PARTS, DEPTHS):
        for kind in kinds:
            for base in BASES if kind in ("onnxruntime", "executorch") else BASES[:1]:
                if turn and (part == "round" or base != "fp32"):
                    continue
                row = Row(
                    part=part, runtime=kind, base=base, depth=depth, batch=batch, tokens=tokens, turn=turn
                )
                yield row
                if depth is not None and kind in ("onnxruntime", "executorch"):
                    yield replace(row, cached=True)


def has_limit(row: Row) -> bool:
    """Whether a figure with a limit is made of it: 8 x 64 tokens, full, or the last two blocks and cached."""
    if (row.batch, row.tokens) != SHAPES[0]:
        return False
    cached = row.depth == 2 and row.cached
    if row.part == "round":  # whose peak counts
        return cached and row.base != "fp16"
    return row.base == "fp32" and (cached or row.depth is None)


def measured(row: Row, bundle: Path, seed: int, steps: int) -> dict[str, float]:
    """A fresh process, so that peak memory is that of one runtime alone."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_measure, (msgspec.json.encode(row), bundle, seed, steps))


def _measure(encoded: bytes, bundle: Path, seed: int, steps: int) -> dict[str, float]:
    row = msgspec.json.decode(encoded, type=Row)
    if row.runtime in ("torch", "peft"):
        return _torch(row, bundle, seed, steps)
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
    prefix = FrozenPrefix(runtime, opened, row.depth, _kept(row, directory))
    times = timed(lambda: prefix.gradient(theta, batch)[0], steps)
    return {**times, "computed": prefix.computed, "reused": prefix.reused}


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
    update = train(request, Tokens(opened), runtime)
    return {
        "cpu_s": time.process_time(),
        "peak_mb": peak_mb(),
        "computed": update.prefixes_computed,
        "reused": update.prefixes_reused,
        "loss": update.header.loss_last,
    }


# torch


def _torch(row: Row, bundle: Path, seed: int, steps: int) -> dict[str, float]:
    import torch

    torch.set_num_threads(1)
    trained, loss = (_lora if row.runtime == "peft" else _adapters)(row, bundle, seed)
    if row.part == "step":

        def step() -> float:
            found = loss()
            torch.autograd.grad(found, trained)
            return float(found.detach())

        return timed(step, steps)
    optimiser = torch.optim.AdamW(trained, lr=5e-3)
    for _ in range(ROUND_STEPS):
        optimiser.zero_grad()
        found = loss()
        found.backward()
        optimiser.step()
    return {"cpu_s": time.process_time(), "peak_mb": peak_mb(), "loss": float(found.detach())}


def _adapters(row: Row, bundle: Path, seed: int) -> tuple[list[Any], Callable[[], Any]]:
    """The last blocks' adapters and the head as one theta, and the loss of the whole model."""
    import torch

    from edge_client.bundle import open_bundle
    from export.base import load_base
    from export.step import AdaptedModel

    manifest = open_bundle(bundle).manifest
    spec = manifest.adapter if row.depth is None else replace(manifest.adapter, depth=row.depth)
    model = AdaptedModel(load_base(minilm_directory(), manifest.task), spec, manifest.labels)
    tensors = {name: torch.from_numpy(value) for name, value in inputs(bundle, row, seed).items()}
    theta = tensors.pop("theta")[-spec.layout.size :].clone().requires_grad_()
    return [theta], lambda: model.loss(theta, *tensors.values())[0]


def _lora(row: Row, bundle: Path, seed: int) -> tuple[list[Any], Callable[[], Any]]:
    """LoRA in the last blocks, by PEFT, under a dense head on the mean of the tokens."""
    import torch
    from peft import LoraConfig, get_peft_model
    from torch import nn

    from export.base import attention_bias, load_base

    base = load_base(minilm_directory(), "sequence-classification")
    layers = len(base.blocks)
    config = LoraConfig(
        r=LORA_RANK,
        lora_alpha=LORA_RANK,
        target_modules=["query", "value"],
        layers_to_transform=list(range(layers - (row.depth or layers), layers)),
    )
    model = get_peft_model(base.model, config)
    found = inputs(bundle, row, seed)
    ids, mask, labels = (torch.from_numpy(found[name]) for name in ("ids", "mask", "labels"))
    head = nn.Linear(base.hidden, int(labels.max()) + 1)
    trained = [p for p in itertools.chain(model.parameters(), head.parameters()) if p.requires_grad]
    bias = attention_bias(mask, is_decoder=False)

    def loss() -> Any:
        hidden = model(input_ids=ids, attention_mask=bias)[0]
        return nn.functional.cross_entropy(head(hidden.mean(1)), labels)

    return trained, loss


# the peak


def step_gflop(batch: int, tokens: int) -> float:
    """The products of the step at full depth with the frozen base.

    6 blocks of 4 h² + 2 h (4 h) weights at h = 384, times 2 FLOP, times forward and backward to the input;
    the backward pass of what lies below the first adapter (4 h²) is not needed.
    """
    return (6 * 12 * 2 - 4) * 384**2 * 2 * batch * tokens / 1e9


def matmul_gflops(seed: int, steps: int) -> float:
    """The best of torch, numpy and ONNX Runtime on (512, 384) x (384, 1536), one thread, CPU time."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_matmul_gflops, (seed, steps))


def _matmul_gflops(seed: int, steps: int) -> float:
    import torch

    torch.set_num_threads(1)
    rng = np.random.default_rng(seed)
    x, w = (rng.standard_normal(s).astype(np.float32) for s in ((512, 384), (384, 1536)))
    flop = 2.0 * 512 * 384 * 1536
    x_t, w_t, product = torch.from_numpy(x), torch.from_numpy(w), matmul_session(w)
    best_ms = min(
        timed(lambda: float((x_t @ w_t)[0, 0]), 10 * steps)["cpu_ms"],
        timed(lambda: float((x @ w)[0, 0]), 10 * steps)["cpu_ms"],
        timed(lambda: float(product.run(None, {"x": x})[0][0, 0]), 10 * steps)["cpu_ms"],
    )
    return flop / best_ms / 1e6


def matmul_session(w: NDArray[np.float32]) -> Any:
    """A session of ONNX Runtime that gives x w, one thread, with its weights prepacked."""
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in "xy")
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "product",
        [x],
        [y],
        [numpy_helper.from_array(w, "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
