"""What a device costs: a cold start to its first check-in, training steps and local rounds against torch's.

The cold start is a real `fedtt client run` process against a real server process. Rows
(`benchmarks.device_rows`) are MiniLM-L6 at 8 texts of 64 tokens and 16 of 128, trained at full depth and in
the last 3, 2 and 1 blocks, over kept activations or not, with a base stored as fp32, fp16 and int8, and with
products in int8, in ONNX Runtime and, where its package and a C++ compiler are, ExecuTorch; beside them
torch eager with the same adapters, and LoRA in PEFT where that is installed (`pip install 'fedtt[bench]'`).
Each row is a process of one thread. `matmul` is the best rate of torch, numpy and ONNX Runtime on the step's
own shape.

Rows with limits come first, and --main measures them alone; --part client alone measures the memory of
whole clients, and no times, so that it may run beside other work. A row that was measured here before, of the
same bundle, machine, packages and seed, is not measured again, so a run that was cut off goes on where it
stopped; --fresh measures all.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import itertools
import json
import os
import resource
import statistics
import sys
import tempfile
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

from msgspec import to_builtins

from benchmarks.device_client import client_peak_mb
from benchmarks.device_figures import AGAINST, AGAINST_CLIENT, SUFFIX, figures_of
from benchmarks.device_page import write_tables
from benchmarks.device_processes import measured
from benchmarks.device_rows import BASES, PRODUCTS, Kept, Kind, Row, has_limit, rows
from benchmarks.device_torch import matmul_gflops
from benchmarks.harness import ROOT, Report, arguments, minilm_directory, reporting

if TYPE_CHECKING:
    from edge_client.bundle import RuntimeName

WORK = ROOT / ".bench"
LABELS = ROOT / "fleet" / "assistant" / "labels.json"


def main() -> None:
    parser = arguments("device", "cold start of a client, its training steps and rounds against torch eager")
    parser.add_argument("--runtime", default="onnxruntime,executorch", help="what is measured (%(default)s)")
    parser.add_argument("--part", choices=("rows", "client"), default="rows", help="(%(default)s)")
    parser.add_argument("--main", action="store_true", help="only rows that limits are set for")
    parser.add_argument("--fresh", action="store_true", help="measure again what was measured here before")
    parser.add_argument(
        "--page", action="store_true", help="run nothing: docs/device.md's tables of the stored"
    )
    args = parser.parse_args()
    if args.page:
        write_tables(
            args.out or ROOT / "benchmarks" / "results" / "device.jsonl", ROOT / "docs" / "device.md"
        )
        return
    with reporting("device", args.out) as report:
        both = "executorch" in args.runtime.split(",") and executorch_library(report) is not None
        runtimes: list[RuntimeName] = ["onnxruntime", "executorch"] if both else ["onnxruntime"]
        if args.part == "client":
            bundles = {base: exported_minilm(base, runtimes, depths="2") for base in BASES if base != "fp16"}
            figures = whole_clients(report, args, runtimes, bundles)
            report.summary(figures, AGAINST_CLIENT)
            return
        cold: dict[str, float] = {}
        for runtime in runtimes:
            cold |= asyncio.run(cold_starts(report, runtime, runs=3 if args.quick else 7))
        report.summary({**cold, **training(report, args, runtimes)}, AGAINST)


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


# training


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


def training(report: Report, args: argparse.Namespace, runtimes: list[RuntimeName]) -> dict[str, float]:
    """Measure what is not measured yet, and sum it up."""
    wanted = wanted_rows(report, args, runtimes)
    depths = sorted({row.depth for row in wanted if row.depth})
    bundles = {
        base: exported_minilm(base, runtimes, depths=",".join(map(str, depths)))
        for base in BASES
        if base in {row.base for row in wanted}
    }
    digests = {base: digest_of(bundle) for base, bundle in bundles.items()}
    found: dict[Row, dict[str, float]] = {}
    with Kept(WORK / f"device-rows{'-quick' if args.quick else ''}.jsonl", fresh=args.fresh) as kept:
        for row in wanted:
            key = {**to_builtins(row), "seed": args.seed, "bundle": digests[row.base]}
            found[row] = kept.get(key) or kept.put(
                key, measured(row, bundles[row.base], args.seed, 5 if args.quick else 15)
            )
            report.line(**to_builtins(row), **found[row])
    return figures_of(found, runtimes, matmul_gflops(args.seed, 5 if args.quick else 20))


def whole_clients(
    report: Report, args: argparse.Namespace, runtimes: list[RuntimeName], bundles: dict[str, Path]
) -> dict[str, float]:
    """What each downloads, and takes of memory, the median of five."""
    figures: dict[str, float] = {}
    runs = 1 if args.quick else 5
    for runtime, base in itertools.product(runtimes, bundles):
        of_base, suffix = "" if base == "fp32" else f"_{base}", SUFFIX[runtime]
        figures[f"bundle_mb_{base}_{suffix}"] = download_mb(bundles[base], runtime)
        peak_mb = client_peak_mb(report, bundles[base], base, runtime, args.seed, runs)
        figures[f"client_peak_rss_mb_k2{of_base}_{suffix}"] = peak_mb
    return figures


def wanted_rows(report: Report, args: argparse.Namespace, runtimes: list[RuntimeName]) -> list[Row]:
    """Those with limits first."""
    kinds: list[Kind] = ["torch", *runtimes]
    if importlib.util.find_spec("peft"):
        kinds.insert(1, "peft")
    else:
        report.line(part="peft", skipped="LoRA's rows need PEFT: pip install 'fedtt[bench]'")
    every = sorted(rows(kinds), key=has_limit, reverse=True)
    if args.quick:
        return [row for row in every if has_limit(row) and not row.turn]
    return [row for row in every if has_limit(row) or not args.main]


def digest_of(bundle: Path) -> str:
    from edge_client.bundle import open_bundle

    return open_bundle(bundle).digest


def exported_minilm(base: str, runtimes: list[RuntimeName], *, depths: str) -> Path:
    """A bundle of the whole and of so many last blocks; tests compare such with torch."""
    from benchmarks.federated import exported  # not by the measured processes, whose memory counts

    stored = ("int8", "--products", "int8") if base == PRODUCTS else (base,)
    options = ("--labels", str(LABELS), "--base", *stored, "--depths", depths, "--no-verify")
    name = f"device-minilm-{base}-k{depths.replace(',', '')}{'-both' if 'executorch' in runtimes else ''}"
    return exported(name, minilm_directory(), *options, "--runtime", ",".join(runtimes))


def download_mb(bundle: Path, runtime: RuntimeName) -> float:
    """What a device with this runtime downloads of a bundle, in 10^6 bytes."""
    from edge_client.bundle import needed_files, open_bundle

    manifest = open_bundle(bundle, runtime).manifest
    files = needed_files(manifest, runtime).values()
    return ((bundle / "manifest.json").stat().st_size + sum(entry.bytes for entry in files)) / 1e6


if __name__ == "__main__":
    main()
