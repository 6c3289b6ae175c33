"""`python -m benchmarks.faults NAME [--quick]`: one row of the table, or `all` of them.

Ends with status 1 where a bound does not hold. `page` runs nothing: it makes the table of docs/faults.md from
what is stored under benchmarks/results/faults, which `--out` writes.
"""

from __future__ import annotations

import asyncio
import sys
import time
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.faults.page import write_page
from benchmarks.faults.row import Outcome, Row, Setting
from benchmarks.harness import ROOT, Report, arguments, reporting

#: row -> what it does; each is a module of this folder with a coroutine function `run`
ROWS = {
    "kill": "kill -9 of the server at random instants, devices in flight",
    "kill-one-of-two": "the same of one of two servers on one SQLite file",
    "flips": "every prefix and single-bit flip of a valid upload in each of four codecs",
    "syscalls": "death, EIO and ENOSPC at the Nth write or sync of a whole round",
    "client": "kill -9 of clients in each phase of their lives; each frame against an unharmed one's",
    "fold": "the sum of 10,000 updates of 20,000 numbers, bounded where they have 8 bits",
    "herd": "10,000 check-ins at the same moment, and the times at which they are told to return",
    "full-disk": "the disk full under load, then with room again",
    "power": "power cuts that lose what was not synced",
    "attacks": "signed bombs, endless bodies, long heads and 2,050 slow connections beside honest devices",
    "soak": "an hour under steady load",
    "schemathesis": "10,000 requests made up from the OpenAPI document, over files and object storage",
    "hostile": "NaN, infinities, wrong layouts, huge norms; a fifth colluding against the best robust fold",
    "judges": "three of ten judges who lie as far as they can, and one without the measure",
    "postgresql": "PostgreSQL killed and crashed under two servers, one of them stopped and resumed",
}


def row(name: str) -> Row:
    found: Row = import_module(f"benchmarks.faults.{name.replace('-', '_')}").run
    return found


def run(name: str, report: Report, *, quick: bool, seed: int, scratch: Path | None) -> Outcome:
    """One row in a directory of its own, with a summary of its own."""
    started = time.perf_counter()
    with TemporaryDirectory(dir=scratch, prefix=f"fedtt-{name}-") as directory:
        setting = Setting(report=report, directory=Path(directory), quick=quick, seed=seed)
        outcome = asyncio.run(row(name)(setting))
    wall_s = round(time.perf_counter() - started, 1)
    if outcome.skipped:
        print(f"SKIPPED {name}: {outcome.skipped}", file=sys.stderr)
        report.line(row=name, skipped=outcome.skipped)
        return outcome
    bounds = {"at_most": dict(outcome.at_most), "at_least": dict(outcome.at_least)}
    report.line(row=name, wall_s=wall_s, figures=outcome.figures, bounds=bounds, failures=outcome.failures)
    for failure in outcome.failures:
        print(f"FAILED {name}: {failure}", file=sys.stderr)
    return outcome


def main() -> None:
    parser = arguments("faults", "What a server and its devices survive.")
    names = (*ROWS, "all", "page")
    parser.add_argument("name", choices=names, metavar="NAME", help=", ".join(names))
    parser.add_argument("--scratch", type=Path, help="on which disk to work (default: the system's)")
    args = parser.parse_args()
    if args.name == "page":
        write_page(ROWS, ROOT / "benchmarks" / "results" / "faults", ROOT / "docs" / "faults.md")
        return
    rows = list(ROWS) if args.name == "all" else [args.name]
    with reporting("faults", args.out) as report:
        outcomes = {
            name: run(name, report, quick=args.quick, seed=args.seed, scratch=args.scratch) for name in rows
        }
        figures = {f"{n}_{key}": v for n, found in outcomes.items() for key, v in found.figures.items()}
        report.summary(
            {key.replace("-", "_"): value for key, value in figures.items()},
            {
                "failures": {name: found.failures for name, found in outcomes.items() if found.failures},
                "skipped": {name: found.skipped for name, found in outcomes.items() if found.skipped},
            },
        )
    sys.exit(int(any(found.failures for found in outcomes.values())))


if __name__ == "__main__":
    main()
