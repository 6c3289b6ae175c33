"""What servers do in a second: durable signed updates on each database, beside a load on the same cores.

`python -m benchmarks.server [--quick] [--part NAME …]`; each part is a coroutine function under
`benchmarks/serving`.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.harness import Report, arguments, reporting
from benchmarks.serving import faults, over_tls, peers, uploads
from benchmarks.serving.part import Measure, Measured, Part

PARTS: dict[str, Measure] = {
    "sqlite": uploads.sqlite,
    "sqlite-one-process": uploads.sqlite_one_process,
    "postgresql": uploads.postgresql,
    "postgresql-two-servers": uploads.postgresql_two_servers,
    "postgresql-one-process": uploads.postgresql_one_process,
    "fold": faults.fold,
    "herd": faults.herd,
    "tls": over_tls.connections_over_tls,
    "flower": peers.flower,
    "flare": peers.flare,
}


def run(name: str, report: Report, *, quick: bool, seed: int, scratch: Path | None) -> Measured:
    """One part in a directory of its own."""
    with TemporaryDirectory(dir=scratch, prefix=f"fedtt-{name}-") as directory:
        part = Part(report=report, directory=Path(directory), quick=quick, seed=seed)
        measured = asyncio.run(PARTS[name](part))
    if measured.skipped:
        print(f"SKIPPED {name}: {measured.skipped}", file=sys.stderr)
        report.line(part=name, skipped=measured.skipped)
    return measured


def main() -> None:
    parser = arguments("server", "What servers do in a second.")
    parser.add_argument("--part", action="append", choices=PARTS, help="which to run (default: all)")
    parser.add_argument("--scratch", type=Path, help="on which disk to work (default: the system's)")
    args = parser.parse_args()
    figures: dict[str, float] = {}
    against: dict[str, str] = {}
    with reporting("server", args.out) as report:
        for name in args.part or PARTS:
            measured = run(name, report, quick=args.quick, seed=args.seed, scratch=args.scratch)
            figures |= measured.figures
            against |= measured.against
        report.summary(figures, against)


if __name__ == "__main__":
    main()
