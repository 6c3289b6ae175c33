"""How long MiniLM-L6's training step takes to compile at full depth, and what the bundle weighs.

Wall time counts from before torch is imported to the bundle in its place, without the comparison with
torch, which is timed apart. Limit: 60 s on 2 cores.
"""

from __future__ import annotations

import resource
import tempfile
import time
from pathlib import Path

from benchmarks.harness import ROOT, Report, arguments, minilm_directory, reporting

LIMIT_S = 60.0


def measure(report: Report, directory: Path, *, depth: int | None, seed: int) -> None:
    """Export once into `directory`, stage by stage, then verify."""
    started, cpu_started = time.perf_counter(), time.process_time()
    from export import ExportRequest, export_bundle, verify_bundle
    from export.labels import read_labels

    stages: list[tuple[str, float]] = [("importing torch", started)]
    labels = read_labels(ROOT / "fleet" / "assistant" / "labels.json")
    request = ExportRequest(model=minilm_directory(), labels=labels, depth=depth, depths=(), seed=seed)
    summary = export_bundle(
        request,
        directory / "bundle",
        verify=False,
        report=lambda stage: stages.append((Path(stage).name, time.perf_counter())),
    )
    exported, cpu_exported = time.perf_counter(), time.process_time()
    for (stage, begun), (_, ended) in zip(stages, [*stages[1:], ("", exported)], strict=True):
        report.line(stage=stage, wall_s=round(ended - begun, 2))
    peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    differences = verify_bundle(directory / "bundle", minilm_directory())
    figures = {
        "export_wall_s": round(exported - started, 1),
        "export_cpu_s": round(cpu_exported - cpu_started, 1),
        "export_peak_resident_mb": round(peak_mb),
        "verify_wall_s": round(time.perf_counter() - exported, 1),
        "largest_difference": max(d.largest for d in differences),
        "bundle_bytes": sum(summary.file_bytes.values()),
        "step_graph_bytes": summary.file_bytes["step.onnx"],
        "trained_numbers": summary.trained_numbers,
        "int4_round_bytes": summary.round_bytes["int4"],
    }
    against = {"export_wall_limit_s": LIMIT_S, "lora_r8_fp32_round_bytes": summary.lora_round_bytes}
    report.summary(figures, against)


def main() -> None:
    args = arguments("export", "compile MiniLM-L6's training step").parse_args()
    with reporting("export", args.out) as report, tempfile.TemporaryDirectory() as directory:
        measure(report, Path(directory), depth=1 if args.quick else None, seed=args.seed)


if __name__ == "__main__":
    main()
