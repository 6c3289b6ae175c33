"""docs/uplink.md's table, made from the stored lines: `python -m benchmarks.uplink --page`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import fmean, stdev

from benchmarks.claims.plan import Plan
from benchmarks.page_table import put_table
from benchmarks.uplink.arms import ArmResult
from benchmarks.uplink.http_bytes import HttpBytes
from benchmarks.uplink.report import (
    Bytes,
    both_ways,
    by_arm,
    bytes_to,
    down_with_headers,
    finals,
    sent,
    up_with_headers,
)

__all__ = ["write_codecs", "write_table"]

COMMAND = "python -m benchmarks.uplink --page"

_HEADINGS = (
    "arm",
    "frame, mean",
    "worst",
    "check-ins",
    "up",
    "down",
    "seeds",
    "rounds",
    "accuracy",
    "loss",
    *(f"{what} to {{{target}}}" for target in (0, 1) for what in ("rounds", "up", "both ways")),
)


def write_table(
    results: Iterable[ArmResult], http: HttpBytes, targets: tuple[float, float], page: Path
) -> None:
    """Put the table into docs/uplink.md, or another page with its marks."""
    headings = [heading.format(*(f"{100 * target:.1f} %" for target in targets)) for heading in _HEADINGS]
    rows = sorted(by_arm(results).items(), key=lambda item: fmean(r.frame_bytes_mean for r in item[1]))
    lines = [(name, *_row(runs, http, targets)) for name, runs in rows]
    put_table(page, COMMAND, headings, lines)


def write_codecs(results: Iterable[ArmResult], plan: Plan, page: Path) -> None:
    """Put the table of methods by codecs into the same page: the last accuracy, and mean bytes of a frame."""
    arms = by_arm(results)
    headings = ["codec", *(arm.format("…") for arm in plan.varied)]
    lines = [
        (variant, *(_cell(arms.get(arm.format(variant), [])) for arm in plan.varied))
        for variant in plan.variants
    ]
    put_table(page, f"{COMMAND}, codecs", headings, lines)


def _cell(runs: Sequence[ArmResult]) -> str:
    if not runs:
        return "–"
    return f"{100 * fmean(finals(runs)):.1f} %, {fmean(run.frame_bytes_mean for run in runs):,.0f}"


def _row(runs: Sequence[ArmResult], http: HttpBytes, targets: tuple[float, float]) -> tuple[str, ...]:
    accuracies = finals(runs)
    spread = f" ± {100 * stdev(accuracies):.1f}" if len(accuracies) > 1 else ""
    return (
        f"{fmean(run.frame_bytes_mean for run in runs):,.0f}",
        f"{max(run.frame_bytes_worst for run in runs):,}",
        f"{fmean(run.check_ins_mean for run in runs):.1f}",
        f"{up_with_headers(runs, http):,.0f}",
        f"{down_with_headers(runs, http):,.0f}",
        str(len(runs)),
        str(min(run.rounds for run in runs)),
        f"{100 * fmean(accuracies):.1f}{spread} %",
        f"{fmean(run.curve[-1].loss for run in runs):.3f}",
        *(cell for target in targets for cell in _to(runs, target)),
    )


def _to(runs: Sequence[ArmResult], target: float) -> tuple[str, str, str]:
    return _rounds(runs, target), _megabytes(runs, target, sent), _megabytes(runs, target, both_ways)


def _rounds(runs: Sequence[ArmResult], target: float) -> str:
    found = bytes_to(runs, target, lambda point: point.version)
    return "–" if found is None else f"{found:.0f}"


def _megabytes(runs: Sequence[ArmResult], target: float, of: Bytes) -> str:
    found = bytes_to(runs, target, of)
    return "–" if found is None else f"{found / 1e6:.2f} MB"
