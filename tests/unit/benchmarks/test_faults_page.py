"""docs/faults.md against what is stored, and against what a row can say."""

from __future__ import annotations

from pathlib import Path

import msgspec

from benchmarks.faults.__main__ import ROWS
from benchmarks.faults.page import write_page
from benchmarks.harness import ROOT

MARKS = "before\n<!-- table: python -m benchmarks.faults page -->\n<!-- end of the table -->\nafter\n"


def test_the_page_is_what_the_stored_rows_say(tmp_path: Path) -> None:
    page, made = ROOT / "docs" / "faults.md", tmp_path / "faults.md"
    made.write_text(page.read_text())
    write_page(ROWS, ROOT / "benchmarks" / "results" / "faults", made)
    assert made.read_text() == page.read_text()


def test_every_row_is_stored() -> None:
    stored = {path.stem for path in (ROOT / "benchmarks" / "results" / "faults").glob("*.jsonl")}
    assert stored == set(ROWS)


def test_a_bound_that_does_not_hold_is_named(tmp_path: Path) -> None:
    bounds = {"at_most": {"lost": 0, "back_s": 2}, "at_least": {"kills": 200}}
    line = {
        "row": "kill",
        "wall_s": 90,
        "figures": {"lost": 0, "back_s": 3.5, "kills": 200},
        "bounds": bounds,
    }
    (tmp_path / "kill.jsonl").write_bytes(
        msgspec.json.encode(line | {"failures": ["back_s = 3.5 exceeds 2"]})
    )
    page = tmp_path / "faults.md"
    page.write_text(MARKS)
    write_page({"kill": "kill -9", "power": "not stored"}, tmp_path, page)
    bounded = "back s 3.5 (at most 2); kills 200 (at least 200)"
    assert f"| `kill` | kill -9 | lost | {bounded} | **no**: back s | 2 min |" in page.read_text()
    assert "power" not in page.read_text()
