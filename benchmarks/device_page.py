"""docs/device.md's tables, made from the stored rows: `python -m benchmarks.device --page`."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from pathlib import Path

import msgspec

from benchmarks.device_rows import BASES, SHAPES, Row
from benchmarks.page_table import put_table

__all__ = ["write_tables"]

_NAMES = {
    "torch": "torch eager",
    "peft": "LoRA, PEFT",
    "onnxruntime": "ONNX Runtime",
    "executorch": "ExecuTorch",
}
_COLUMNS = ((None, False), *((depth, cached) for depth in (3, 2, 1) for cached in (False, True)))
_HEADINGS = ("full", *(f"{depth}{', kept' * cached}" for depth, cached in _COLUMNS[1:]))

Values = dict[tuple[str, str, int | None, bool], float]  #: (runtime, base, depth, cached) -> median of turns


def write_tables(stored: Path, page: Path) -> None:
    """Steps' and rounds' time over torch eager's at full depth, and the most memory of either."""
    lines = [json.loads(line) for line in stored.read_bytes().splitlines()]
    found = [
        (msgspec.convert({key: line[key] for key in Row.__struct_fields__}, Row), line)
        for line in lines
        if line.get("part") in ("step", "round")
    ]
    for shape in SHAPES:
        rows = [(row, line) for row, line in found if (row.batch, row.tokens) == shape]
        steps = _values(rows, "step", "cpu_ms")
        training = _values(rows, "round", "training_cpu_s")
        _put(page, "steps", shape, steps, _over(steps, "cpu_ms"))
        _put(page, "rounds", shape, training, _over(training, "training_cpu_s"))
        for title, part in (("memory", "round"), ("memory of steps", "step")):
            _put(page, title, shape, _values(rows, part, "peak_mb"), lambda value: f"{value:.0f}")


def _values(rows: list[tuple[Row, dict[str, float]]], part: str, figure: str) -> Values:
    turns: dict[tuple[str, str, int | None, bool], list[float]] = {}
    for row, line in rows:
        if row.part == part:
            turns.setdefault((row.runtime, row.base, row.depth, row.cached), []).append(line[figure])
    return {key: statistics.median(values) for key, values in turns.items()}


def _over(values: Values, figure: str) -> Callable[[float], str]:
    """As a ratio to torch eager at full depth; its own cell says what that is."""
    eager = values["torch", "fp32", None, False]
    whole = f"{eager:.0f} ms" if figure.endswith("ms") else f"{eager:.1f} s"
    return lambda value: f"1 ({whole})" if value == eager else f"{value / eager:.2f}"


def _put(
    page: Path, part: str, shape: tuple[int, int], values: Values, shown: Callable[[float], str]
) -> None:
    command = f"python -m benchmarks.device --page, {part} of {shape[0]} x {shape[1]}"
    kinds = dict.fromkeys(key[:2] for key in values)
    rows = [
        (
            _NAMES[runtime],
            base.replace("-", " "),
            *(
                shown(values[runtime, base, *column]) if (runtime, base, *column) in values else "–"
                for column in _COLUMNS
            ),
        )
        for runtime, base in sorted(kinds, key=_place)
    ]
    put_table(page, command, ("", "base", *_HEADINGS), rows, left=2)


def _place(kind: tuple[str, str]) -> tuple[int, int]:
    return list(_NAMES).index(kind[0]), BASES.index(kind[1])
