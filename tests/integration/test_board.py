"""The rehearsal of a board with this interpreter in the place of the board's."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from benchmarks.board import rehearse
from benchmarks.harness import Report


@pytest.mark.slow
async def test_the_rehearsal_of_a_board_comes_to_the_same_losses_each_time(
    tmp_path: Path, tiny_bundle: Path
) -> None:
    report = Report("board", None)
    first, second = [
        await rehearse(report, tmp_path, tiny_bundle, "onnxruntime", [sys.executable]) for _ in range(2)
    ]
    assert first["lease"] != second["lease"]
    for loss in ("loss_first", "loss_last"):
        assert first[loss] == pytest.approx(second[loss], rel=1e-5)
    assert first["loss_last"] < first["loss_first"]
