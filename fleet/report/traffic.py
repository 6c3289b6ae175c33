"""What travelled, and what was folded."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from functools import partial

from fleet.report.axes import BYTES, SHARE
from fleet.report.cards import Runs, card, each_run, version_of
from fleet.report.charts import Axis, Bars, bar_chart, line_chart, row_chart
from fleet.report.record import Run
from fleet.run_files import Outcome, VersionLine

__all__ = ["measured", "staleness", "traffic"]

_AGES, _CHARTS = 12, 12


def traffic(runs: Runs) -> Iterator[str]:
    """Bytes by kind; and as they added up."""
    with_bytes = [run for run in runs if run.totals and run.totals.sent_bytes]
    if not with_bytes:
        return
    bars = [Bars(name=r.name, style=runs.index(r), values=_bytes(r.totals)) for r in with_bytes if r.totals]
    note = "Bodies of messages, of all devices together; bundles, which each downloads once, are not here."
    yield card("Bytes by kind", row_chart(_BYTE_KINDS, bars, BYTES, "bytes by kind"), note)
    series = each_run(runs, version_of, lambda line: line.update_bytes)
    if any(each.points for each in series):
        x, y = Axis(label="version", from_zero=True), Axis(label="bytes", unit=BYTES, from_zero=True)
        yield card("Bytes of one update", line_chart(series, x, y), "Mean over all until then.")


_BYTE_KINDS = ("updates, up", "all else, up", "versions, plans and answers, down")


def _bytes(totals: VersionLine | Outcome) -> list[float]:
    other = max(0, totals.sent_bytes - totals.frame_bytes)
    return [totals.frame_bytes, other, totals.received_bytes]


def staleness(runs: Runs) -> Iterator[str]:
    """By how many versions the bases of updates had been overtaken."""
    found = [_ages(run) for run in runs]
    if not any(age for ages in found for age in ages):
        if any(found):
            yield "<p class='note'>Every update was folded onto the very version it began from.</p>"
        return
    most = min(max(age for ages in found for age in ages), _AGES)
    names = [f"{age}" for age in range(most)] + [f"{most}" if most < _AGES else f"{most} or more"]
    bars = []
    for n, (run, ages) in enumerate(zip(runs, found, strict=True)):
        total = max(1, sum(ages.values()))
        shares = [ages[age] / total for age in range(most)]
        bars.append(Bars(name=run.name, style=n, values=[*shares, max(0.0, 1 - sum(shares))]))
    y = Axis(label="updates", unit=SHARE)
    yield card("Age of what updates began from", bar_chart(names, bars, y, "versions behind"))
    series = each_run(runs, version_of, _mean_age)
    x, y = Axis(label="version", from_zero=True), Axis(label="versions behind", from_zero=True)
    yield card("Mean age in each version", line_chart(series, x, y))


def _ages(run: Run) -> Counter[int]:
    total: Counter[int] = Counter()
    for line in run.versions:
        total.update({max(0, age): count for age, count in line.staleness.items()})
    return total


def _mean_age(line: VersionLine) -> float | None:
    count = sum(line.staleness.values())
    return sum(age * n for age, n in line.staleness.items()) / count if count else None


def measured(runs: Runs) -> Iterator[str]:
    """What the method said of each version, one chart a quantity."""
    names = list(dict.fromkeys(name for run in runs for line in run.versions for name in line.report))
    for name in names[:_CHARTS]:
        series = each_run(runs, version_of, partial(_reported, name))
        yield card(name, line_chart(series, Axis(label="version", from_zero=True), Axis(label=name)))


def _reported(name: str, line: VersionLine) -> float | None:
    return line.report.get(name)
