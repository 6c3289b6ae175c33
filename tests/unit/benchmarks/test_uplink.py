from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.claims.case import Point
from benchmarks.claims.plan import read_plan
from benchmarks.uplink.__main__ import PAGE, PLAN
from benchmarks.uplink.arms import ArmResult
from benchmarks.uplink.http_bytes import HttpBytes
from benchmarks.uplink.page import write_codecs, write_table
from benchmarks.uplink.report import (
    KILOBYTE,
    LORA_DENSE,
    LORA_FP32,
    OURS,
    both_ways,
    bytes_to,
    figures_of,
    sent,
)
from fedtt.codec import CodecSpec
from fedtt.task import read_task

HTTP = HttpBytes(
    check_in_sent=600,
    check_in_received=200,
    version_sent=700,
    version_received=250,
    update_sent=650,
    update_received=150,
)


def result(arm: str, accuracies: list[float], frame: int, seed: int = 0, method: str = "fedtt") -> ArmResult:
    """Ten participations a version, as many bytes down as up."""
    points = [
        Point(n, accuracy, 2 - accuracy, 10 * n * frame, 20 * n * frame, 20 * n * frame, float(n))
        for n, accuracy in enumerate(accuracies)
    ]
    return ArmResult(
        arm=arm,
        seed=seed,
        method=method,
        codec=CodecSpec(quantise="ternary", coding="range"),
        trained_numbers=100,
        rounds=len(points) - 1,
        participations=10 * (len(points) - 1),
        frame_bytes_mean=frame,
        frame_bytes_worst=frame + 5,
        check_ins_mean=2.0,
        sent_bytes_mean=2 * frame,
        received_bytes_mean=2 * frame,
        curve=points,
        wall_s=1.0,
    )


def test_every_arm_of_the_plan_is_a_task_that_is_allowed() -> None:
    cases = list(read_plan(PLAN).cases())
    assert len({(case.arm.name, case.seed) for case in cases}) == len(cases)
    for case in cases:
        read_task({"name": "t", "seed": case.seed, **case.settings("task")}, case.arm.name)
    assert {OURS, KILOBYTE, LORA_FP32} <= {case.arm.name for case in cases}
    assert any(case.arm.name.startswith(LORA_DENSE) for case in cases)


def test_bytes_to_a_target_are_linear_between_two_judged_versions() -> None:
    runs = [result("a", [0.5, 0.7, 0.9], 100)]
    assert bytes_to(runs, 0.8, sent) == pytest.approx(3000)  # 2,000 at 70 %, 4,000 at 90 %
    assert bytes_to(runs, 0.8, both_ways) == pytest.approx(6000)
    assert bytes_to([*runs, result("a", [0.5, 0.6], 100, seed=1)], 0.8, sent) is None


def test_the_summary_compares_with_arms_that_were_run_and_says_none_of_others() -> None:
    ours = result(OURS, [0.5, 0.9], 100)
    assert figures_of([], HTTP) == {}
    alone = figures_of([ours], HTTP)
    assert alone["total_bytes_lora_fp32_over_ours"] is None
    assert alone["uplink_mean_bytes"] == 100
    assert alone["uplink_mean_bytes_with_http_headers"] == 750
    assert alone["participation_up_bytes_with_http_headers"] == 2750  # 200 + 2 · 600 + 700 + 650
    lora = result(f"{LORA_DENSE}, rate 1", [0.5, 0.9], 30_000, method="fedlora")
    coded = result("LoRA", [0.5, 0.9], 1000, method="ffa-lora")
    found = figures_of([ours, lora, coded], HTTP)
    assert found["total_bytes_lora_fp32_over_ours"] == 300
    assert found["total_bytes_lora_coded_over_ours"] == 10
    longer = figures_of([ours, lora, coded, result(KILOBYTE, [0.5, 0.9], 1000, method="fed-sb")], HTTP)
    assert (
        longer["total_bytes_lora_fp32_over_ours"],
        longer["kilobyte_total_bytes_lora_fp32_over_ours"],
    ) == (300, 30)
    assert longer["kilobyte_total_bytes_lora_coded_over_ours"] == 1  # Fed-SB itself is no LoRA variant here


def test_the_table_is_written_between_its_marks_cheapest_arm_first(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    begin, end = [mark for mark in PAGE.read_text().splitlines() if mark.startswith("<!--")][:2]
    page.write_text(f"before\n{begin}\nold\n{end}\nafter\n")
    runs = [result("dear", [0.5, 0.9], 2000), result("cheap", [0.5, 0.7], 100)]
    write_table([*runs, result("cheap", [0.5, 0.8], 100, seed=1)], HTTP, (0.8, 0.9), page)
    lines = page.read_text().splitlines()
    assert (lines[0], lines[-1]) == ("before", "after")
    assert "old" not in lines
    rows = [line for line in lines if line.startswith("| ")]
    assert rows[1].startswith(
        "| cheap | 100 | 105 | 2.0 | 2,750 | 1,000 | 2 | 1 | 75.0 ± 7.1 % | 1.250 | – |"
    )
    assert rows[2].startswith("| dear | 2,000 | 2,005 | 2.0 | 6,550 | 4,800 | 1 | 1 | 90.0 % |")


def test_each_codec_has_a_row_and_each_method_a_column(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    begin, end = [mark for mark in PAGE.read_text().splitlines() if mark.startswith("<!--")][2:]
    page.write_text(f"before\n{begin}\nold\n{end}\nafter\n")
    runs = [result("LoRA r8, ternary, falling rate", [0.5, 0.9], 2000), result("else", [0.1, 0.2], 1)]
    write_codecs(runs, read_plan(PLAN), page)
    rows = [line for line in page.read_text().splitlines() if line.startswith("| ")]
    assert [cell.strip() for cell in rows[0].split("|")[1:6]] == [
        "codec",
        "FedTT r5, …, falling rate",
        "FedTT+ r5, …, falling rate",
        "exact FedTT r5, …, falling rate",
        "LoRA r8, …, falling rate",
    ]
    (row,) = (row for row in rows if row.startswith("| ternary |"))
    assert row == "| ternary | – | – | – | 90.0 %, 2,000 | – | – |"
