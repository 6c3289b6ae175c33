"""python -m benchmarks.uplink: the arms of uplink.toml that are not in the results yet, then what they say.

One arm takes two or three minutes of one core. Results are kept line by line, so a run may be cut short. With
`--page` nothing is run: the summary, the plot and the table of docs/uplink.md are made of what is stored.
With `--recount` what devices send beside frames is counted anew for all that is stored, by runs without
training of some seconds each. `--search` runs the arms of search.toml in their place, by which our
settings were chosen, judged on rows that are not reported.
"""

from __future__ import annotations

import shlex
import sys
import time
from pathlib import Path

import msgspec

from benchmarks.claims.plan import Case, Plan, read_plan
from benchmarks.harness import ROOT, arguments, machine
from benchmarks.uplink.arms import ArmResult, run_arm
from benchmarks.uplink.http_bytes import HttpBytes, measured
from benchmarks.uplink.page import write_codecs, write_table
from benchmarks.uplink.recount import recounted
from benchmarks.uplink.report import AGAINST, KILOBYTE, OURS, figures_of, plot, target_of

PLAN, SEARCH = (Path(__file__).with_name(f"{name}.toml") for name in ("uplink", "search"))
RESULTS = ROOT / "benchmarks" / "results" / "uplink.jsonl"
SEARCHED = RESULTS.with_stem("uplink-search")
PAGE = ROOT / "docs" / "uplink.md"


class Stored:
    """A results file: what HTTP adds, the arms, and a summary that is made anew."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        lines = path.read_bytes().splitlines() if path and path.is_file() else []
        self.arms = [
            msgspec.json.decode(line, type=ArmResult) for line in lines if line.startswith(b'{"arm"')
        ]
        http = [msgspec.json.decode(line)["http"] for line in lines if line.startswith(b'{"http"')]
        self.http = msgspec.convert(http[0], HttpBytes) if http else measured()

    def rounds(self, case: Case) -> int:
        """How far this case was lived."""
        key = (case.arm.name, case.seed)
        return max((arm.rounds for arm in self.arms if (arm.arm, arm.seed) == key), default=0)

    def add(self, result: ArmResult) -> None:
        """In the place of a shorter run of the same arm and seed."""
        key = (result.arm, result.seed)
        self.arms = [*(arm for arm in self.arms if (arm.arm, arm.seed) != key), result]
        self.write()

    def recount(self, plan: Plan) -> None:
        """What HTTP adds, and of each arm what its devices send beside frames."""
        self.http = measured()
        cases = {(case.arm.name, case.seed): case for case in plan.cases()}
        for arm in self.arms:
            self.add(recounted(arm, cases[arm.arm, arm.seed]))

    def write(self, *, summary: bool = False) -> None:
        """Print the last line, and put all of them into the file."""
        lines = [msgspec.json.encode(line) for line in ({"http": self.http}, *self.arms)]
        if summary:
            command = shlex.join(["python", "-m", "benchmarks.uplink", *sys.argv[1:]])
            figures = figures_of(self.arms, self.http)
            end = {"benchmark": "uplink", "figures": figures, "against": AGAINST}
            lines.append(msgspec.json.encode(end | {"machine": machine(), "command": command}))
        print(lines[-1].decode(), flush=True)
        if self.path:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_bytes(b"".join(line + b"\n" for line in lines))


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
    parser.add_argument("--seeds", type=int, help="the first so many seeds of each arm")
    parser.add_argument("--until", type=int, help="live each arm no further than this version")
    parser.add_argument(
        "--page", action="store_true", help="run nothing: summary, plot and table of the stored"
    )
    parser.add_argument("--recount", action="store_true", help="train nothing: check-ins of the stored, anew")
    parser.add_argument("--search", action="store_true", help="arms of search.toml, on the search rows")
    args = parser.parse_args()
    plan, until = read_plan(SEARCH if args.search else PLAN), time.time() + 60 * args.minutes
    plan = msgspec.structs.replace(plan, seeds=plan.seeds[: args.seeds])
    kept = Stored(args.out or (None if args.quick else SEARCHED if args.search else RESULTS))
    if args.recount:
        kept.recount(plan)
    for case in () if args.page or args.recount else (shortened(plan) if args.quick else plan).cases():
        wanted = args.until or case.settings("task")["rounds"]["count"]
        if kept.rounds(case) >= wanted or args.only not in case.arm.name or time.time() > until:
            continue
        kept.add(run_arm(case, args.until))
    kept.write(summary=True)
    if kept.path and not args.search:
        plot(kept.arms, kept.path.with_suffix(".svg"))
    targets = target_of(kept.arms, OURS), target_of(kept.arms, KILOBYTE)
    if kept.path == RESULTS and targets[0] is not None and targets[1] is not None:
        beside = {arm.format(codec) for arm in plan.varied for codec in plan.variants if codec != "sign"}
        write_table(
            [arm for arm in kept.arms if arm.arm not in beside], kept.http, (targets[0], targets[1]), PAGE
        )
        write_codecs(kept.arms, plan, PAGE)


if __name__ == "__main__":
    main()
