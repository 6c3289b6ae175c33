from __future__ import annotations

from pathlib import Path

from benchmarks.device_figures import figures_of
from benchmarks.device_rows import Kept, Kind, has_limit, rows

KINDS: tuple[Kind, ...] = ("torch", "peft", "onnxruntime", "executorch")
FIGURES = {
    "cpu_ms": 2.0,
    "fill_cpu_ms": 6.0,
    "cpu_s": 1.0,
    "training_cpu_s": 0.5,
    "peak_mb": 100.0,
    "computed": 16,
    "reused": 64,
}


def test_rows_with_limits_suffice_for_every_figure_with_a_limit() -> None:
    found = {row: FIGURES for row in rows(KINDS) if has_limit(row)}
    figures = figures_of(found, ["onnxruntime", "executorch"], gflops=100.0)
    assert figures["step_k2_cached_over_eager_cpu_executorch"] == 1.0
    assert figures["training_peak_rss_mb_k2_int8_executorch"] == 100.0
    assert figures["activation_reuse_in_a_round_executorch"] == 64 / 16
    assert figures["activation_fill_k2_over_step_cpu_executorch"] == 6 / 2
    assert figures["step_full_int8_products_over_eager_cpu_executorch"] == 1.0
    assert figures["step_k2_cached_int8_products_over_eager_cpu_onnx"] == 1.0
    assert figures["step_full_share_of_matmul_peak_onnx"] == figures["step_at_matmul_peak_ms"] / 2


def test_no_row_is_measured_twice_in_a_run() -> None:
    every = list(rows(KINDS))
    assert len(every) == len(set(every))


def test_a_run_that_was_cut_off_reads_what_it_measured_and_only_that(tmp_path: Path) -> None:
    path, row = tmp_path / "rows.jsonl", {"part": "step", "seed": 0, "bundle": "ab"}
    with Kept(path, fresh=False) as kept:
        kept.put(row, FIGURES)
    with path.open("a") as file:
        file.write('{"machine": {"cpu": "another"}, "row": {"part": "step", "seed": 1}, "found": {}}\n{"mach')
    with Kept(path, fresh=False) as kept:
        assert kept.get(row) == FIGURES
        assert kept.get({**row, "seed": 1}) is None
        assert kept.get({**row, "bundle": "cd"}) is None
        kept.put({**row, "seed": 2}, FIGURES)
    with Kept(path, fresh=False) as kept:
        assert kept.get({**row, "seed": 2}) == FIGURES
    with Kept(path, fresh=True) as kept:
        assert kept.get(row) is None
