"""What `benchmarks.device` compares with: torch eager, LoRA in PEFT, and the matrix products alone.

Torch eager trains the same adapters with the base frozen, at the same depth and without a cache; LoRA is
PEFT's on query and value, with a dense head.
"""

from __future__ import annotations

import itertools
import multiprocessing
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from msgspec.structs import replace
from numpy.typing import NDArray

from benchmarks.device_processes import ROUND_STEPS, inputs, peak_mb, timed
from benchmarks.device_rows import Row
from benchmarks.harness import minilm_directory

__all__ = ["matmul_gflops", "step_gflop", "torch_row"]

LORA_RANK = 8


def torch_row(row: Row, bundle: Path, seed: int, steps: int) -> dict[str, float]:
    import torch

    torch.set_num_threads(1)
    trained, loss = (_lora if row.runtime == "peft" else _adapters)(row, bundle, seed)
    if row.part == "step":

        def step() -> float:
            found = loss()
            torch.autograd.grad(found, trained)
            return float(found.detach())

        return timed(step, steps)
    began = time.process_time()
    optimiser = torch.optim.AdamW(trained, lr=5e-3)
    for _ in range(ROUND_STEPS):
        optimiser.zero_grad()
        found = loss()
        found.backward()
        optimiser.step()
    return {
        "cpu_s": time.process_time(),
        "training_cpu_s": time.process_time() - began,
        "peak_mb": peak_mb(),
        "loss": float(found.detach()),
    }


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


def step_gflop(batch: int, tokens: int, cached: int | None = None) -> float:
    """The products with the frozen base: at full depth, or of so many last blocks over kept activations.

    6 blocks of 4 h² + 2 h (4 h) weights at h = 384, times 2 FLOP, times forward and backward to the input.
    The backward pass of what lies below the first adapter (4 h²) is not needed, nor its forward pass if kept.
    """
    units = 6 * 24 - 4 if cached is None else cached * 24 - 8
    return units * 384**2 * 2 * batch * tokens / 1e9


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
