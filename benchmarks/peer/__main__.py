"""`python -m benchmarks.peer PROGRAM JOB ANSWER`: run one program, write its answer."""

from __future__ import annotations

import sys
from pathlib import Path

from benchmarks.peer.job import Answer, Job, read_job, write


def main() -> None:
    program, job, answer = sys.argv[1], read_job(Path(sys.argv[2])), Path(sys.argv[3])
    if (found := _run(program, job)) is not None:
        write(answer, found)


def _run(program: str, job: Job) -> Answer | None:
    """None in all processes of a program but one."""
    match program:
        case "ours" | "ours-framed" | "ours-int8":
            from benchmarks.peer import ours

            return ours.run(job, framed=program == "ours-framed")
        case "flower":
            from benchmarks.peer import in_flower

            return in_flower.run(job)
        case "pfl":
            from benchmarks.peer import in_pfl

            return in_pfl.run(job)
    raise SystemExit(f"there is no program {program!r}")


if __name__ == "__main__":
    main()
