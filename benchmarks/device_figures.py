"""What `benchmarks.device` says of its rows: ratios first, and what they are held against."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from benchmarks.device_rows import PRODUCTS, SHAPES, Kind, Row
from benchmarks.device_torch import step_gflop

__all__ = ["AGAINST", "AGAINST_CLIENT", "SUFFIX", "figures_of"]

SUFFIX = {"onnxruntime": "onnx", "executorch": "executorch"}
COLD_START_LIMIT_S, COLD_START_LIMIT_MB = 1.0, 120.0

AGAINST = {
    "cold_start_s_*": f"<= {COLD_START_LIMIT_S}: process start to the first check-in's answer",
    "cold_start_resident_mb_*": f"<= {COLD_START_LIMIT_MB}: resident then, no model loaded",
    "*_over_eager_cpu": "CPU time over that of torch eager's full step of the same shape",
    "step_full_over_eager_cpu_onnx": "<= 0.45",
    "step_full_over_eager_cpu_executorch": "<= 0.9",
    "step_k2_cached_over_eager_cpu_onnx": "<= 0.15: the last two blocks over kept activations, once filled",
    "step_k2_cached_over_eager_cpu_executorch": "<= 0.35: the same",
    "step_full_int8_products_over_eager_cpu_onnx": "<= 0.45",
    "step_full_int8_products_over_eager_cpu_executorch": "<= 0.9",
    "step_k2_cached_int8_products_over_eager_cpu_onnx": "<= 0.15",
    "step_k2_cached_int8_products_over_eager_cpu_executorch": "<= 0.35",
    "training_peak_rss_mb_k2_*": "a process that opens the bundle, fills activations, trains a round",
    "activation_reuse_in_a_round_*": "rows read from what was kept, over rows computed, in 10 steps",
    "activation_fill_k2_over_step_cpu_*": "to compute and write a batch's rows, over a step that reads them",
    "round_*_cpu_over_eager": "a process's CPU time, imports and all, over torch's of the same shape",
    "round_*_training_cpu_over_eager": "ten steps, from texts to the coded update; of torch the steps alone",
    "step_full_share_of_matmul_peak_*": "step_at_matmul_peak_ms / the step in fp32",
    "matmul_k2_cached_over_eager_cpu": "the same of the last two blocks over kept activations",
    "matmul_over_eager_cpu": "step_at_matmul_peak_ms / torch eager's full step, a bound",
    "step_at_matmul_peak_ms": "the step's matrix products alone at matmul_gflops",
}
AGAINST_CLIENT = {
    "client_peak_rss_mb_k2_*": "<= 150: a whole client, from its start to the receipt of its update; the "
    "median of five",
    "bundle_mb_int8_*": "<= 25: all that a device downloads",
}

Found = dict[Row, dict[str, float]]


def figures_of(found: Found, runtimes: Sequence[Kind], gflops: float) -> dict[str, float]:
    """gflops: the machine's best rate on the step's own products, of one thread."""
    figures = {"matmul_gflops": gflops}
    eager = medians(found, "step", "cpu_ms")
    at_peak_ms = step_gflop(*SHAPES[0]) / gflops * 1e3
    torch_ms = eager["torch_fp32_full_8x64"]
    cached_ms = step_gflop(*SHAPES[0], cached=2) / gflops * 1e3
    figures |= {
        "step_at_matmul_peak_ms": at_peak_ms,
        "matmul_over_eager_cpu": at_peak_ms / torch_ms,
        "matmul_k2_cached_over_eager_cpu": cached_ms / torch_ms,
    }
    for runtime in runtimes:
        figures |= asked(runtime, eager, found)
        full_ms = eager[f"{SUFFIX[runtime]}_fp32_full_8x64"]
        figures[f"step_full_share_of_matmul_peak_{SUFFIX[runtime]}"] = at_peak_ms / full_ms
    for name, ms in eager.items():
        figures[f"step_{name}_cpu_ms"] = ms
        figures[f"step_{name}_over_eager_cpu"] = ms / eager["torch_fp32_full_" + name.rsplit("_", 1)[1]]
    for figure in ("cpu_s", "training_cpu_s"):
        whole = medians(found, "round", figure)
        for name, seconds in whole.items():
            figures[f"round_{name}_{figure}"] = seconds
            if eager_s := whole.get("torch_fp32_full_" + name.rsplit("_", 1)[1]):
                figures[f"round_{name}_{figure.removesuffix('_s')}_over_eager"] = seconds / eager_s
    for part in ("step", "round"):
        figures |= {f"{part}_{name}_peak_mb": mb for name, mb in medians(found, part, "peak_mb").items()}
    return figures


def name_of(row: Row) -> str:
    depth = "full" if row.depth is None else f"k{row.depth}{'_cached' if row.cached else ''}"
    return f"{SUFFIX.get(row.runtime, row.runtime)}_{row.base}_{depth}_{row.batch}x{row.tokens}"


def medians(found: Found, part: str, figure: str) -> dict[str, float]:
    """Of the turns of each row that has the figure, by its name."""
    values: dict[str, list[float]] = {}
    for row, line in found.items():
        if row.part == part and figure in line:
            values.setdefault(name_of(row), []).append(line[figure])
    return {name: statistics.median(turns) for name, turns in values.items()}


def asked(runtime: str, ms: dict[str, float], found: Found) -> dict[str, float]:
    """The figures with limits: at 8x64, over torch eager at full depth in fp32."""
    suffix = SUFFIX[runtime]
    full, cached = (f"{suffix}_fp32_{depth}_8x64" for depth in ("full", "k2_cached"))
    reuse = next(line for row, line in found.items() if row.part == "round" and name_of(row) == cached)
    filled_ms = medians(found, "step", "fill_cpu_ms")[cached]
    peaks = medians(found, "round", "peak_mb")
    integers = {
        f"step_{depth}_int8_products_over_eager_cpu_{suffix}": ms[name] / ms["torch_fp32_full_8x64"]
        for depth in ("full", "k2_cached")
        if (name := f"{suffix}_{PRODUCTS}_{depth}_8x64") in ms
    }
    return integers | {
        f"step_full_over_eager_cpu_{suffix}": ms[full] / ms["torch_fp32_full_8x64"],
        f"step_k2_cached_over_eager_cpu_{suffix}": ms[cached] / ms["torch_fp32_full_8x64"],
        f"training_peak_rss_mb_k2_{suffix}": peaks[cached],
        f"training_peak_rss_mb_k2_int8_{suffix}": peaks[f"{suffix}_int8_k2_cached_8x64"],
        f"activation_reuse_in_a_round_{suffix}": reuse["reused"] / max(1, reuse["computed"]),
        f"activation_fill_k2_over_step_cpu_{suffix}": filled_ms / ms[cached],
    }
