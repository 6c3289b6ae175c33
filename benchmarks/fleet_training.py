"""Real training in the fleet: 100 devices of CLINC150 on MiniLM-L6 with TT adapters, batched and one by one.

Every measurement is of a process of its own. Rates are of wall time on `THREADS` threads.
`share_of_matmul_peak` counts the matrix products that the step needs on the tokens that stand there: those
with frozen weights, of the attention and of the thin factors, forward and backward, but neither padding,
contractions of cores, nor products below the first adapter. The peak is the best rate of torch, numpy and
ONNX Runtime on any of the step's own shapes of frozen products.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from benchmarks.harness import Report, minilm_directory, shared_data
from edge_client.bundle import Bundle, open_bundle
from edge_client.examples import Shard
from edge_client.trainer import TrainingRequest
from fedtt.adapter import AdapterSpec, initial_theta
from fedtt.algorithms import FedTT
from fedtt.codec import CodecSpec
from fedtt.kinds import TTBottleneck
from fedtt.messages import Plan
from fedtt.optimiser import TrainingSpec
from fedtt.wire import encode_theta, version_digest
from fleet.backends import Backend, Inputs, Losses
from fleet.pool import Pool

__all__ = ["real_training"]

DEVICES, LOCAL_STEPS, BATCH, THREADS = 100, 10, 16, 2
RANK, MAX_TOKENS = 8, 64
Found = TypeVar("Found")
WIDE = 4  #: inner width of an MLP over the hidden one


def real_training(report: Report, *, quick: bool, seed: int) -> dict[str, object]:
    """Device-steps a second of the batched pass against one by one, at full depth and at depth 2."""
    figures: dict[str, object] = {}
    gflops = _apart(_matmul_gflops, 5 if quick else 30)["gflops"]
    figures["matmul_peak_gflops"] = round(gflops, 1)
    for name, depth in (("", None), ("_depth2", 2)):
        bundle = _bundle(depth)
        found: dict[str, dict[str, float]] = {}
        for trainer in ("batched-onnx", "batched-torch", "one-by-one"):
            found[trainer] = _apart(_train, str(bundle), trainer, quick, seed)
            report.line(part="training", depth=depth or "all", trainer=trainer, **found[trainer])
        alone = _rate(found["one-by-one"])
        batched = max((found["batched-onnx"], found["batched-torch"]), key=_rate)
        figures |= {
            f"batched_device_steps_per_s{name}": round(_rate(batched), 1),
            f"sequential_device_steps_per_s{name}": round(alone, 1),
            f"batched_over_sequential{name}": round(_rate(batched) / alone, 2),
            f"share_of_matmul_peak{name}": round(batched["gflops"] / gflops, 3),
            f"outside_passes_share{name}": round(batched["outside_passes_share"], 3),
            f"padding_share{name}": round(batched["padding_share"], 4),
            f"batched_resident_mb{name}": round(batched["resident_mb"]),
        }
        if depth is not None:
            figures[f"activation_uses{name}"] = round(batched["activation_uses"], 2)
    return figures


def _rate(line: dict[str, float]) -> float:
    return line["device_steps_per_s"]


def _apart(function: Callable[..., dict[str, float]], *values: object) -> dict[str, float]:
    """In a process of its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, values)


def _bundle(depth: int | None) -> Path:
    """The exported bundle, with the graphs of many devices beside it."""
    from benchmarks.federated import WORK, exported
    from export.emulation import compile_emulation

    names = json.loads((shared_data("data/clinc150") / "labels.json").read_text())["labels"][:150]
    WORK.mkdir(exist_ok=True)
    labels = WORK / "clinc150-labels.json"
    labels.write_text(json.dumps({"labels": names}))
    options = ("--labels", str(labels), "--rank", str(RANK), "--max-tokens", str(MAX_TOKENS))
    depth_options = ("--depth", str(depth)) if depth else ()
    bundle = exported(f"fleet-clinc150-{depth or 'full'}", minilm_directory(), *options, *depth_options)
    compile_emulation(bundle, minilm_directory())
    return bundle


def _train(directory: str, trainer: str, quick: bool, seed: int) -> dict[str, float]:
    """Rounds of all devices, of the first few where they train one by one; the best round counts.

    In the first round nothing is remembered: it shows as `first_device_steps_per_s`.
    """
    from benchmarks.device import resident_mb
    from fleet.batched import BatchedPool
    from fleet.pools import open_pool

    bundle = open_bundle(Path(directory))
    few = 4 if quick else 10
    devices = few if trainer == "one-by-one" else (20 if quick else DEVICES)
    pool, timed = open_pool(trainer, bundle, THREADS, minilm_directory()), None
    if isinstance(pool, BatchedPool):
        timed = _Timed(pool.backend)
        pool = BatchedPool(bundle, timed)
    rounds_s = [
        _round_s(pool, _requests(bundle, round_number, seed)[:devices])
        for round_number in range(1, 3 if quick else 4)
    ]
    found = {
        "device_steps_per_s": devices * LOCAL_STEPS / min(rounds_s[1:]),
        "first_device_steps_per_s": devices * LOCAL_STEPS / rounds_s[0],
        "resident_mb": resident_mb(_own_pid()),
    }
    if timed is not None and isinstance(pool, BatchedPool):
        counts = pool.counts
        gflop = step_gflop(bundle.manifest.adapter, counts.tokens / counts.device_steps / BATCH) * BATCH
        uses = counts.activations_computed + counts.activations_reused
        found |= {
            "gflops": found["device_steps_per_s"] * gflop,
            "outside_passes_share": 1 - timed.inside_s / sum(rounds_s),
            "padding_share": counts.padding_share,
            "activation_uses": uses / max(1, counts.activations_computed),
        }
    return found


class _Timed:
    """A backend that counts how long each of its threads computes.

    The rest is tokens, optimisers, codecs and copies, and waiting for the last pass of a step.
    """

    def __init__(self, inner: Backend) -> None:
        self._inner, self.cut, self.passes_at_once = inner, inner.cut, inner.passes_at_once
        self._inside_s = 0.0
        self._guard = threading.Lock()

    @property
    def inside_s(self) -> float:
        return self._inside_s / self.passes_at_once

    def hidden(self, ids: NDArray[np.int64], mask: NDArray[np.int64]) -> NDArray[np.float32]:
        return self._counted(lambda: self._inner.hidden(ids, mask))

    def step(self, inputs: Inputs) -> tuple[Losses, NDArray[np.float32]]:
        return self._counted(lambda: self._inner.step(inputs))

    def _counted(self, run: Callable[[], Found]) -> Found:
        began = time.perf_counter()
        found = run()
        with self._guard:
            self._inside_s += time.perf_counter() - began
        return found


def _own_pid() -> int:
    return multiprocessing.current_process().pid or 0


def _round_s(pool: Pool, requests: Sequence[TrainingRequest]) -> float:
    began = time.perf_counter()
    handles = [pool.submit(request) for request in requests]
    for handle in handles:
        handle.result()
    return time.perf_counter() - began


def _requests(bundle: Bundle, round_number: int, seed: int) -> list[TrainingRequest]:
    """Of all devices: Dirichlet(0.5) shards of CLINC150, 10 steps of 16, AdamW, 4 bits."""
    from benchmarks.clinc150 import rows
    from fleet.partition import dirichlet

    names = list(bundle.manifest.labels)
    examples = rows(shared_data("data/clinc150") / "train.jsonl.gz", names)
    shards = dirichlet([names.index(str(e.label)) for e in examples], DEVICES, 0.5, seed, least=BATCH)
    adapter = bundle.manifest.adapter
    version = encode_theta(initial_theta(adapter, seed))
    plan = Plan(
        task="clinc150",
        seed=seed,
        bundle=bundle.digest,
        version=version_digest(version),
        version_number=round_number - 1,
        round=round_number,
        live=adapter.layout.everything.indices,
        training=TrainingSpec(learning_rate=1e-2, local_steps=LOCAL_STEPS, batch_size=BATCH),
        codec=CodecSpec(quantise="int4"),
        method=FedTT(),
        min_examples=1,
    )
    return [
        TrainingRequest(
            plan=plan,
            device=f"{number:032x}",
            bundle=bundle,
            version=version,
            examples=Shard([examples[i] for i in shard]),
        )
        for number, shard in enumerate(shards)
    ]


def step_gflop(adapter: AdapterSpec, tokens: float) -> float:
    """Matrix products of one row of so many tokens, forward and backward, in 10^9 floating point operations.

    A product of (m, k) and (k, n) counts 2 m k n. In the lowest adapted block only what lies above its
    first adapter is run backward.
    """
    h, depth = adapter.hidden, adapter.depth
    attention_weights, mlp_weights = 4 * h * h, 2 * WIDE * h * h
    forward = 2 * tokens * depth * (attention_weights + mlp_weights)
    backward = forward - 2 * tokens * attention_weights
    scores = 2 * 2 * tokens * tokens * h  # query by key, and weights by value
    scores_both = scores * depth + 2 * scores * (depth - 1)
    return (forward + backward + scores_both + _thin_flop(adapter, tokens)) / 1e9


def _thin_flop(adapter: AdapterSpec, tokens: float) -> float:
    """Of the adapters: forward, and backward to their input and to their halves."""
    if not isinstance(adapter.inserted, TTBottleneck):
        return 0.0
    matrices = (adapter.inserted.down, adapter.inserted.up)
    halves = sum(m.ranks[m.split] * (m.d_in + m.d_out) for m in matrices)
    return 3 * 2 * tokens * adapter.depth * len(adapter.inserted.sites) * halves


def _matmul_gflops(repeats: int) -> dict[str, float]:
    """The best rate of torch, numpy and ONNX Runtime on the frozen products of a pass of 1,024 tokens."""
    import torch

    torch.set_num_threads(THREADS)
    best: dict[str, float] = {}
    for k, n in ((384, 384), (384, 4 * 384), (4 * 384, 384)):
        rng = np.random.default_rng(0)
        x = rng.standard_normal((1024, k), np.float32)
        w = rng.standard_normal((k, n), np.float32)
        x_t, w_t, session = torch.from_numpy(x), torch.from_numpy(w), _product_session(w)
        runs: dict[str, Callable[[], object]] = {
            "torch": partial(torch.matmul, x_t, w_t),
            "numpy": partial(np.matmul, x, w),
            "onnxruntime": partial(session.run, None, {"x": x}),
        }
        for name, run in runs.items():
            rate = 2.0 * 1024 * k * n / _least_s(run, repeats) / 1e9
            best[name] = max(rate, best.get(name, 0.0))
    return {"gflops": max(best.values()), **best}


def _least_s(run: Callable[[], object], repeats: int) -> float:
    run()
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        run()
        times.append(time.perf_counter() - began)
    return min(times)


def _product_session(weight: np.ndarray[Any, Any]) -> Any:
    import onnx
    import onnxruntime
    from onnx import TensorProto, helper

    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "product",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["m", weight.shape[0]])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["m", weight.shape[1]])],
        [onnx.numpy_helper.from_array(weight, "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = THREADS
    return onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def main() -> None:
    """This part alone."""
    from benchmarks.harness import arguments, reporting

    args: argparse.Namespace = arguments("fleet_training", "Real training in the fleet.").parse_args()
    with reporting("fleet_training", args.out) as report:
        figures = real_training(report, quick=args.quick, seed=args.seed)
        report.summary(
            figures,
            {
                "batched_over_sequential": "device-steps a second of the batched pool over one by one",
                "share_of_matmul_peak": "aim: at least 0.6",
            },
        )


if __name__ == "__main__":
    main()
