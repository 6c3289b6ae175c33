"""python -m benchmarks.claims run|report: every experiment beside this file, as far as it is not done yet."""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import msgspec

from benchmarks.claims.case import Result, run_case
from benchmarks.claims.data import WORK
from benchmarks.claims.plan import Case, Plan, plans, read_plan, small
from benchmarks.claims.report import write_report
from benchmarks.harness import ROOT
from edge_client.files import try_lock

RESULTS = ROOT / "benchmarks" / "results" / "claims"
Key = tuple[str, float]  #: of a result
_WAITED_S = 5.0  #: for what another process computes


def stored(path: Path) -> list[Result]:
    if not path.is_file():
        return []
    return [msgspec.json.decode(line, type=Result) for line in path.read_bytes().splitlines()]


def run(name: str, plan: Plan, until: float, results: Path = RESULTS, rates_from: Plan | None = None) -> None:
    """Choose each arm's learning rate, then run what is not in a results file yet.

    rates_from: the plan of that name, whose searches are run first, into its own file, where missing.
    Several processes may do this together: each takes runs that no other has begun, and returns when there
    are none.
    """
    path, searches_path = (results / f"{each}.jsonl" for each in (name, plan.rates_from or name))
    cases, searches = list(plan.cases()), list((rates_from or plan).searches())
    needed = [search for search in searches if any(_decides(search, case) for case in cases)]
    while time.time() < until:
        done, searched = ({r.key: r for r in stored(each)} for each in (path, searches_path))
        waiting = [(searches_path, s, s.rate) for s in needed if (s.digest, s.rate) not in searched]
        for case in cases:
            rate = _rate(case, needed, searched)
            if (case.digest, rate) not in done:
                waiting.append((path, case, rate))
        if not waiting:
            return
        for file, case, rate in waiting:
            if rate is None:
                continue
            with _mine(case, rate) as is_mine:
                if is_mine and (case.digest, rate) not in {result.key for result in stored(file)}:
                    _append(file, case, rate)
                    break
        else:
            if all(rate is not None for *_, rate in waiting):
                return  # others are at the rest
            time.sleep(_WAITED_S)


def _with_data(name: str, plan: Plan) -> Plan:
    """The plan without the sets of which something is not there."""
    shared, sets = ROOT.parent / "shared", list(plan.sets)
    for each in plan.sets:
        needed = [f"data/{each.name}"]
        needed += ["models/stories260k"] if plan.model.get("base") == "stories" else []
        if absent := [path for path in needed if not (shared / path).is_dir()]:
            print(f"SKIPPED: {name} needs {absent[0]} in a folder `shared` beside the project", flush=True)
            sets.remove(each)
    return msgspec.structs.replace(plan, sets=tuple(sets))


def _decides(search: Case, case: Case) -> bool:
    """Whether it is one of the searches by which a case's rate is chosen."""
    set_ = case.set.name if case.plan.rates_from else case.set.shown
    return (search.set.shown, search.arm.name) == (set_, case.arm.rate_of or case.arm.name)


def _rate(case: Case, searches: Iterable[Case], searched: Mapping[Key, Result]) -> float | None:
    """That of its arm's best search, by accuracy, then loss; None while some are missing."""
    found = [searched.get((s.digest, s.rate or 0.0)) for s in searches if _decides(s, case)]
    if not found:
        raise SystemExit(f"no search chooses a rate for {case.arm.name!r} on {case.set.name!r}")
    there = [result for result in found if result]
    if len(there) < len(found):
        return None
    return max(there, key=lambda r: (r.last.accuracy or 0.0, -r.last.loss)).rate


def _of_today(
    name: str, plan: Plan, results: list[Result], rates_from: Plan, searched: list[Result]
) -> list[Result]:
    """Those that the plan asks for as it is now, at the rates chosen now; says how many others there are."""
    searches, known = list(rates_from.searches()), {result.key: result for result in searched}
    asked = {(search.digest, search.rate) for search in plan.searches()}
    asked |= {(case.digest, _rate(case, searches, known)) for case in plan.cases()}
    found = [result for result in results if result.key in asked]
    if others := len(results) - len(found):
        print(f"{name}: {others} stored lines are of another plan than today's, and left out", flush=True)
    return found


def _append(path: Path, case: Case, rate: float) -> None:
    """One line: of a new run, or of the same one that another experiment has asked for before."""
    others = (r for file in path.parent.glob("*.jsonl") if file != path for r in stored(file))
    known = next((r for r in others if r.key == (case.digest, rate)), None)
    names = {"set": case.set.shown, "partition": case.partition, "arm": case.arm.name}
    result = msgspec.structs.replace(known, **names) if known else run_case(case, rate)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as file:
        file.write(msgspec.json.encode(result) + b"\n")
    last = result.last
    shown = f"accuracy {last.accuracy:.1%}" if last.accuracy is not None else f"loss {last.loss:.3f}"
    about = (path.stem, *names.values(), f"seed {case.seed}", f"rate {rate:g}")
    print(f"{' · '.join(about)}: {shown} in {result.wall_s:.0f} s", flush=True)


@contextmanager
def _mine(case: Case, rate: float) -> Iterator[bool]:
    """Whether no other process has begun this run; none begins it while the block lasts."""
    directory = WORK / "begun"
    directory.mkdir(parents=True, exist_ok=True)
    descriptor = try_lock(directory / f"{case.digest}-{rate:g}")
    try:
        yield descriptor is not None
    finally:
        if descriptor is not None:
            os.close(descriptor)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.claims", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    running = commands.add_parser("run", help="run what is missing, one run after another; may be cut short")
    running.add_argument("names", nargs="*", metavar="EXPERIMENT", help=", ".join(plans()))
    running.add_argument("--minutes", type=float, default=float("inf"), help="begin no run after so many")
    running.add_argument("--quick", action="store_true", help="hardly any work, into --results of its own")
    reporting = commands.add_parser(
        "report", help="write docs/results.md and its plots from the stored lines"
    )
    for command in (running, reporting):
        command.add_argument("--results", type=Path, default=RESULTS, help="directory of the stored lines")
    args = parser.parse_args()
    known = plans()
    if args.command == "report":
        read = {name: read_plan(path) for name, path in known.items()}
        kept = {name: stored(args.results / f"{name}.jsonl") for name in read}
        lines = {}
        for name, plan in read.items():
            source = plan.rates_from or name
            lines[name] = plan, _of_today(name, plan, kept[name], read[source], kept[source])
        write_report(lines, ROOT / "docs")
        return
    for name in args.names or known:
        if name not in known:
            raise SystemExit(f"there is no experiment {name!r}; known are {', '.join(known)}")
    until = time.time() + 60 * args.minutes
    if args.quick and args.results == RESULTS:
        args.results = Path(tempfile.mkdtemp(prefix="claims-"))
    size = small if args.quick else lambda plan: plan
    read = {name: size(read_plan(path)) for name, path in known.items()}
    asked = {name: _with_data(name, read[name]) for name in args.names or known}
    for seeds in range(1, 1 + max(len(plan.seeds) for plan in asked.values())):
        for name, plan in asked.items():  # an early end leaves whole comparisons of every experiment
            some = msgspec.structs.replace(plan, seeds=plan.seeds[:seeds])
            run(name, some, until, args.results, read.get(plan.rates_from))


if __name__ == "__main__":
    main()
