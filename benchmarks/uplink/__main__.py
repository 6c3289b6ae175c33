"""python -m benchmarks.uplink: every arm of uplink.toml that is not in the results yet, then the summary."""

from __future__ import annotations

import time
from pathlib import Path

import msgspec

from benchmarks.claims.plan import read_plan
from benchmarks.harness import ROOT, arguments
from benchmarks.uplink.arms import ArmResult, run_arm

PLAN = Path(__file__).with_name("uplink.toml")
RESULTS = ROOT / "benchmarks" / "results" / "uplink.jsonl"


def stored(path: Path) -> list[ArmResult]:
    """The arms of a results file; its summary is made anew."""
    lines = path.read_bytes().splitlines() if path.is_file() else []
    return [msgspec.json.decode(line, type=ArmResult) for line in lines if line.startswith(b'{"arm"')]


def main() -> None:
    parser = arguments("uplink", __doc__)
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no arm after so many")
    parser.add_argument("--only", default="", help="arms whose names hold this")
    args = parser.parse_args()
    out = args.out or RESULTS
    plan, until = read_plan(PLAN), time.time() + 60 * args.minutes
    done = {(result.arm, result.seed) for result in stored(out)}
    for case in plan.cases():
        key = case.arm.name, case.seed
        if key in done or args.only not in case.arm.name or time.time() > until:
            continue
        result = run_arm(case)
        out.parent.mkdir(parents=True, exist_ok=True)
        with out.open("ab") as file:
            file.write(msgspec.json.encode(result) + b"\n")
        curve = {point.version: round(point.accuracy or 0, 4) for point in result.curve}
        print(
            *key,
            result.frame_bytes_mean,
            result.frame_bytes_worst,
            result.received_bytes_mean,
            curve,
            flush=True,
        )


if __name__ == "__main__":
    main()
