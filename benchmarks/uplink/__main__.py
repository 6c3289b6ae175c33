"""python -m benchmarks.uplink: the arms of uplink.toml that are not in the results yet, then what they say.

One arm takes a minute or two of one core. Results are kept line by line, so a run may be cut short.
"""

from __future__ import annotations

import shlex
import sys
import time
from pathlib import Path

import msgspec

from benchmarks.claims.plan import Plan, read_plan
from benchmarks.harness import ROOT, arguments, machine
from benchmarks.uplink.arms import ArmResult, run_arm
from benchmarks.uplink.report import AGAINST, figures_of, plot

PLAN = Path(__file__).with_name("uplink.toml")
RESULTS = ROOT / "benchmarks" / "results" / "uplink.jsonl"


def stored(path: Path) -> list[ArmResult]:
    """The arms of a results file; its summary is made anew."""
    lines = path.read_bytes().splitlines() if path.is_file() else []
    return [msgspec.json.decode(line, type=ArmResult) for line in lines if line.startswith(b'{"arm"')]


def shortened(plan: Plan) -> Plan:
    """Our arm and what it is compared with, for two rounds."""
    task = plan.task | {"rounds": {"count": 2, "cohort": 10}}
    return msgspec.structs.replace(
        plan, task=task, judge_every=2, test_rows=50, arms=plan.arms[:1], seeds=plan.seeds[:1]
    )


def main() -> None:
    parser = arguments("uplink", "bytes up and down of methods and codecs, and what they buy")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no arm after so many")
    parser.add_argument("--only", default="", help="arms whose names hold this")
    args = parser.parse_args()
    plan, until = read_plan(PLAN), time.time() + 60 * args.minutes
    out = args.out or (None if args.quick else RESULTS)
    done = stored(out) if out else []
    for case in (shortened(plan) if args.quick else plan).cases():
        known = {(result.arm, result.seed) for result in done}
        if (case.arm.name, case.seed) in known or args.only not in case.arm.name or time.time() > until:
            continue
        done.append(run_arm(case))
        write(done, out)
    write(done, out, summary=True)
    if out:
        plot(done, out.with_suffix(".svg"))


def write(results: list[ArmResult], out: Path | None, *, summary: bool = False) -> None:
    """Print the last line, and put all of them into the file."""
    lines = [msgspec.json.encode(result) for result in results]
    if summary:
        command = shlex.join(["python", "-m", "benchmarks.uplink", *sys.argv[1:]])
        end = {"benchmark": "uplink", "figures": figures_of(results), "against": AGAINST}
        lines.append(msgspec.json.encode(end | {"machine": machine(), "command": command}))
    print(lines[-1].decode(), flush=True)
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_bytes(b"".join(line + b"\n" for line in lines))


if __name__ == "__main__":
    main()
