"""What a comparison that was cut short takes up again, and what becomes of a program that does not end."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import numpy as np
import pytest

from benchmarks.peer import programs
from benchmarks.peer.job import Answer, Job
from benchmarks.peer.kept import KeptAnswers
from benchmarks.peer.programs import Failed, Program, start

JOB = Job(devices=2, cohort=2, rounds=1, seed=0, processes=1, threads=1, scratch=Path("anywhere"))
ANSWER = Answer(updates=4, wall_s=2.0, late_updates=2, late_wall_s=1.0, losses=[0.5])


def test_an_answer_is_found_again_with_its_factors_and_forgotten_by_a_fresh_start(tmp_path: Path) -> None:
    np.save(tmp_path / "theta.npy", np.arange(3.0))
    answer = KeptAnswers(tmp_path / "kept", resume=False).keep(
        Answer(
            updates=4,
            wall_s=2.0,
            late_updates=2,
            late_wall_s=1.0,
            losses=[0.5],
            theta=tmp_path / "theta.npy",
        ),
        "noop",
        JOB,
    )
    (tmp_path / "theta.npy").unlink()  # as the next run does

    resumed = KeptAnswers(tmp_path / "kept", resume=True)
    found = resumed.find("noop", JOB)
    assert found == answer
    assert found is not None
    assert found.theta is not None
    assert np.load(found.theta).tolist() == [0.0, 1.0, 2.0]
    assert resumed.find("depth-2", JOB) is None
    assert KeptAnswers(tmp_path / "kept", resume=False).find("noop", JOB) is None


def test_a_program_that_does_not_end_in_time_is_ended_with_what_it_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pid = tmp_path / "pid"
    monkeypatch.setattr(programs, "WORK", tmp_path)
    monkeypatch.setattr(Program, "command", lambda *_: ["sh", "-c", f"sleep 60 & echo $! > {pid}; wait"])
    with pytest.raises(Failed, match="not done after 1 s"):
        start(Program(name="slow", python=Path(sys.executable)), JOB, limit_s=1.0)
    until = time.monotonic() + 10
    while _runs(pid.read_text().strip()):
        assert time.monotonic() < until, "a process it started still runs"
        time.sleep(0.01)


def _runs(pid: str) -> bool:
    try:
        return "State:\tZ" not in (Path("/proc") / pid / "status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
