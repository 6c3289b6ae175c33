"""Tables and plots from the stored lines: docs/results.md, made by one command."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import matplotlib as mpl

from benchmarks.claims.case import Point, Result
from benchmarks.claims.plan import Plan

mpl.use("Agg")
from matplotlib import pyplot as plt

__all__ = ["write_report"]

mpl.rcParams["svg.hashsalt"] = "results"  # names within a file are the same each time

HEAD = """# Results

The papers' claims, measured again on the emulator with the code of clients and server, but for the step:
that is torch's, of the same adapters. Its products are in bfloat16, frozen matrices are rounded to it, and
what frozen blocks give is kept in float16; arms that say float32 show what that does. This page is made by
`python -m benchmarks.claims report` from the plans in `benchmarks/claims/`, which hold the verdicts too, and
the lines in `benchmarks/results/claims/`, which `python -m benchmarks.claims run` made. No run took an hour
on two cores; most take less than a minute.

Rates are learning rates of the devices' AdamW. A method chose its own from the same list as all others, by
one run each on rows that are neither trained on nor reported. Experiments whose plan names another one
(`rates_from`) take what was chosen there, under that one's settings, and so do arms with a `rate_of`.
*Edge* marks one at an end of the list, beyond which a better one may lie. Accuracy is the last version's on
test rows, mean ± standard deviation over seeds; a seed deals out the data, draws the devices and orders their
batches, and all start from the same factors. Gap is the mean difference to the first arm over the same seeds,
in points, with its standard deviation. Trained an update are the numbers that a frame carries, on average:
what a method freezes, or trains in other rounds, is not among them. Bytes an update are of frames up and of
all bodies but bundles down. Those to a target count the frames that all devices sent (and all bodies but
bundles that they received) until a judged version had reached it: three points above the start, which slow
methods reach too, and the first arm's final accuracy less one point.
*Local only* is the mean over devices that each train by themselves, for as many steps as they take on average
in the federation; *centralised* is all rows in one place, with as many steps as all devices take together.
Neither sends anything; both are dotted in the plots.
"""

_HEADER_BYTES = 46  #: of a frame, one more or less: a quarter of a number
_EARLY = 0.03  #: of accuracy above the start, or of nats below it: what slow methods reach too
Group = tuple[str, str]  #: set, partition


def write_report(read: Mapping[str, tuple[Plan, Sequence[Result]]], docs: Path) -> None:
    """Write results.md and one plot an experiment into `docs`."""
    parts = [HEAD]
    for name, (plan, results) in read.items():
        reported = [result for result in results if not result.searched]
        searched = read[plan.rates_from][0] if plan.rates_from in read else plan
        parts.append(
            f"\n## {plan.title}\n\n{_flowing(plan.question)}\n\nReduced here: {_flowing(plan.reduced)}\n"
        )
        if not reported:
            parts.append("\nNot run yet.\n")
            continue
        parts.append(f"\n**Verdict.** {plan.verdict.strip() or 'None yet.'}\n")
        _plot(plan, reported, docs / f"results-{name}.svg")
        axis = "virtual time" if plan.by_time else "bytes sent"
        parts.append(f"\n![accuracy against {axis}](results-{name}.svg)\n")
        for group in _groups(reported):
            parts.append(f"\n**{group[0]}, {group[1]}**\n\n")
            found = [r for r in reported if (r.set, r.partition) == group]
            parts.append(_table(plan, found, searched.rates))
    (docs / "results.md").write_text("".join(parts))


def _flowing(text: str) -> str:
    return " ".join(text.split())


def _groups(results: Iterable[Result]) -> list[Group]:
    return list(dict.fromkeys((result.set, result.partition) for result in results))


def _table(plan: Plan, results: list[Result], rates: Sequence[float]) -> str:
    by_arm = {arm.name: [r for r in results if r.arm == arm.name] for arm in plan.arms}
    by_arm = {arm: runs for arm, runs in by_arm.items() if runs}
    measure, better = ("accuracy", max) if results[0].last.accuracy is not None else ("loss", min)
    first = next(iter(by_arm.values()))
    goal = statistics.mean(_value(r.last) for r in first)
    goal += -plan.target_below_points / 100 if measure == "accuracy" else 0.01 * goal
    start = statistics.mean(_value(run.curve[0]) for run in first)
    early = start + _EARLY if measure == "accuracy" else start - _EARLY
    goals = [(early, _shown(early, measure)), (goal, _shown(goal, measure))]
    federated = [runs for runs in by_arm.values() if not _is_bound(runs[0])] or list(by_arm.values())
    best = better(statistics.mean(_value(r.last) for r in runs) for runs in federated)
    scores = _scores(results)
    heads = [
        "arm",
        "trained / update",
        "rate",
        "seeds",
        measure,
        "gap",
        *scores,
        "up / update",
        "down / update",
    ]
    if plan.by_time:
        heads += [*(f"virtual time to {shown}" for _, shown in goals), "at the end"]
    heads += [f"{what} to {shown}" for _, shown in goals for what in ("up", "up and down")]
    lines = ["| " + " | ".join(heads) + " |", "|---" + "|---:" * (len(heads) - 1) + "|"]
    for arm, runs in by_arm.items():
        values = [_value(r.last) for r in runs]
        bold = "**" if statistics.mean(values) == best else ""
        cells = [
            arm,
            f"{statistics.mean(map(_trained, runs)):,.0f}",
            f"{runs[0].rate:g}" + (" edge" if runs[0].rate in (min(rates), max(rates)) else ""),
            str(len(runs)),
            f"{bold}{_spread(values, measure)}{bold}",
            _gap(runs, first, measure),
            *(_spread([_score(name, r) for r in runs], "accuracy") for name in scores),
        ]
        if _is_bound(runs[0]):
            lines.append("| " + " | ".join(cells + ["–"] * (len(heads) - len(cells))) + " |")
            continue
        cells += [
            _bytes(statistics.mean(map(_frame_bytes, runs))),
            _bytes(statistics.mean(map(_received_bytes, runs))),
        ]
        if plan.by_time:
            cells += [
                *(_to_goal(runs, aim, _virtual_s, _minutes) for aim, _ in goals),
                _minutes(_end_s(runs)),
            ]
        cells += [_to_goal(runs, aim, cost, _bytes) for aim, _ in goals for cost in (_up, _both_ways)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _is_bound(result: Result) -> bool:
    """Whether it is no federation, but what it is measured against: nothing was sent."""
    return not result.participations


def _trained(result: Result) -> float:
    """Numbers that a device trains in a round, on average: those of its frame, which is of float32."""
    if _is_bound(result):
        return result.trained_numbers
    return (_frame_bytes(result) - _HEADER_BYTES) / 4


def _frame_bytes(result: Result) -> float:
    return result.frame_bytes_mean or result.last.frame_bytes / result.participations


def _received_bytes(result: Result) -> float:
    return result.received_bytes_mean or result.last.received_bytes / result.participations


def _value(point: Point) -> float:
    return point.loss if point.accuracy is None else point.accuracy


def _shown(goal: float, measure: str) -> str:
    return f"{goal:.1%}" if measure == "accuracy" else f"{goal:.3f} nats"


def _scores(results: Iterable[Result]) -> tuple[str, ...]:
    return ("F1", "Matthews") if all(r.confusion for r in results) else ()


def _score(name: str, result: Result) -> float:
    """Of label 1, from the counts by (right, found); 0 where it has no value."""
    tn, fp, fn, tp = result.confusion or (0, 0, 0, 0)
    if name == "F1":
        return 2 * tp / max(1, 2 * tp + fp + fn)
    product = (tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)
    return (tp * tn - fp * fn) / math.sqrt(product) if product else 0.0


def _gap(runs: Sequence[Result], first: Sequence[Result], measure: str) -> str:
    """Mean difference to the first arm, seed by seed."""
    base = {r.seed: _value(r.last) for r in first}
    gaps = [_value(r.last) - base[r.seed] for r in runs if r.seed in base]
    if runs is first or not gaps:
        return ""
    spread = statistics.stdev(gaps) if len(gaps) > 1 else 0.0
    if measure == "accuracy":
        return f"{100 * statistics.mean(gaps):+.1f} ± {100 * spread:.1f}"
    return f"{statistics.mean(gaps):+.3f} ± {spread:.3f}"


def _spread(values: list[float], measure: str) -> str:
    mean, sd = statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{100 * mean:.1f} ± {100 * sd:.1f} %" if measure == "accuracy" else f"{mean:.3f} ± {sd:.3f}"


def _end_s(runs: Sequence[Result]) -> float:
    return statistics.mean(run.last.virtual_s for run in runs)


def _up(point: Point) -> float:
    return point.frame_bytes


def _both_ways(point: Point) -> float:
    return point.frame_bytes + point.received_bytes


def _virtual_s(point: Point) -> float:
    return point.virtual_s


def _to_goal(
    runs: Sequence[Result], goal: float, cost: Callable[[Point], float], shown: Callable[[float], str]
) -> str:
    """Mean cost over the seeds that reached it; says how many did where not all."""
    found = []
    for run in runs:
        reached = (p for p in run.curve if (p.loss <= goal if p.accuracy is None else p.accuracy >= goal))
        if point := next(reached, None):
            found.append(cost(point))
    if not found:
        return "not reached"
    share = "" if len(found) == len(runs) else f" ({len(found)} of {len(runs)})"
    return shown(statistics.mean(found)) + share


def _bytes(count: float) -> str:
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"


def _minutes(seconds: float) -> str:
    return f"{seconds / 60:.0f} min"


def _plot(plan: Plan, results: list[Result], path: Path) -> None:
    groups = _groups(results)
    columns = min(3, len(groups))
    rows = -(-len(groups) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(4.6 * columns, 3.6 * rows), squeeze=False)
    for axis, group in zip(axes.flat, groups, strict=False):
        for number, arm in enumerate(plan.arms):
            runs = [r for r in results if (r.set, r.partition) == group and r.arm == arm.name]
            for run in runs:
                if _is_bound(run):
                    axis.axhline(
                        _value(run.last),
                        color=f"C{number % 10}",
                        linewidth=1,
                        linestyle=":",
                        label=arm.name if run is runs[0] else None,
                    )
                    continue
                points = run.curve[0 if plan.by_time else 1 :]
                axis.plot(
                    [p.virtual_s / 60 if plan.by_time else p.frame_bytes for p in points],
                    [_value(p) for p in points],
                    color=f"C{number % 10}",
                    linewidth=1,
                    label=arm.name if run is runs[0] else None,
                )
        axis.set(
            xscale="linear" if plan.by_time else "log",
            title=", ".join(group),
            xlabel="virtual minutes" if plan.by_time else "bytes of all frames",
            ylabel="accuracy" if results[0].last.accuracy is not None else "loss",
        )
        axis.grid(alpha=0.3)
        axis.legend(fontsize=6)
    for axis in list(axes.flat)[len(groups) :]:
        axis.set_visible(False)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
