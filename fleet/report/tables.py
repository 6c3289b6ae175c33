"""Figures and settings."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence

from fleet.report.axes import BYTES, NUMBER, SECONDS, SHARE, Unit
from fleet.report.cards import Runs, details, named, table
from fleet.report.record import Run
from fleet.report.text import escaped
from fleet.run_files import VersionLine

__all__ = ["numbers", "overview", "settings", "task_of"]

_ROWS = 60


def task_of(run: Run) -> str:
    if run.outcome:
        return run.outcome.task
    told = run.settings.get("task.name")
    return str(json.loads(told)) if told else run.name


_FIGURES: tuple[tuple[str, Callable[[Run], str]], ...] = (
    ("Accuracy", lambda run: _last(run, lambda line: line.accuracy, SHARE)),
    ("Loss", lambda run: _last(run, lambda line: line.loss, NUMBER)),
    ("Versions", lambda run: "–" if run.version is None else f"{run.version:,}"),
    ("Took part", lambda run: f"{len(run.work):,} of {run.population:,}"),
    ("Check-ins", lambda run: "–" if run.totals is None else f"{run.totals.check_ins:,}"),
    ("Sent up", lambda run: _total(run, "sent_bytes", BYTES)),
    ("Sent down", lambda run: _total(run, "received_bytes", BYTES)),
    ("Bundles down", lambda run: _total(run, "bundle_bytes", BYTES)),
    ("Virtual time", lambda run: _total(run, "virtual_s", SECONDS)),
    ("Wall time", lambda run: _total(run, "wall_s", SECONDS)),
)


def _last(run: Run, value: Callable[[VersionLine], float | None], unit: Unit) -> str:
    found = [at for line in run.judged if (at := value(line)) is not None]
    return unit.text(found[-1]) if found else "–"


def _total(run: Run, name: str, unit: Unit) -> str:
    return "–" if run.totals is None else unit.text(getattr(run.totals, name))


def overview(runs: Runs) -> str:
    """The figures at a glance; of several runs, side by side."""
    if len(runs) == 1:
        (run,) = runs
        tiles = "".join(f"<div><dt>{name}</dt><dd>{of(run)}</dd></div>" for name, of in _FIGURES)
        return f"<dl class='figures'>{tiles}</dl>{_how_it_ended(run)}"
    head = ["Run", "State", *(name for name, _ in _FIGURES)]
    rows = [[named(runs, run), escaped(run.state), *(of(run) for _, of in _FIGURES)] for run in runs]
    return f"<div class='card'>{table(head, rows)}</div>" + "".join(map(_how_it_ended, runs))


def _how_it_ended(run: Run) -> str:
    name = escaped(run.name)
    if run.outcome is None:
        reach = "nothing" if run.version is None else f"what came until version {run.version}"
        return f"<p class='note'>{name} has not come to its end: this shows {reach}.</p>"
    if run.state != "finished" and run.outcome.reason:
        return f"<p class='note'>{name} {escaped(run.state)}: {escaped(run.outcome.reason)}.</p>"
    return ""


def numbers(runs: Runs) -> Iterator[str]:
    """The versions that were judged, to read and to copy."""
    head = ["Version", "Accuracy", "Loss", "Up", "Down", "Bundles", "Virtual time", "Updates", "Devices"]
    for run in runs:
        lines = run.judged or run.versions
        if not lines:
            continue
        every = -(-len(lines) // _ROWS)
        shown = [*lines[:-1:every], lines[-1]]
        rows = [
            [
                f"{line.version}",
                "–" if line.accuracy is None else SHARE.text(line.accuracy),
                "–" if line.loss is None else f"{line.loss:.4f}",
                BYTES.text(line.sent_bytes),
                BYTES.text(line.received_bytes),
                BYTES.text(line.bundle_bytes),
                SECONDS.text(line.virtual_s),
                f"{line.updates:,}",
                f"{line.participations.devices if line.participations else 0:,}",
            ]
            for line in shown
        ]
        yield details(f"{run.name}: versions", table(head, rows))


def settings(runs: Runs) -> Iterator[str]:
    """Where they differ, and all of them."""
    names = sorted({name for run in runs for name in run.settings})
    if not names:
        return
    head = ["Setting", *(named(runs, run) for run in runs)] if len(runs) > 1 else ["Setting", "Value"]

    def rows(chosen: Sequence[str]) -> list[list[str]]:
        return [
            [f"<code>{escaped(name)}</code>", *(escaped(run.settings.get(name, "–")) for run in runs)]
            for name in chosen
        ]

    differ = [name for name in names if len({run.settings.get(name) for run in runs}) > 1]
    if differ:
        yield f"<div class='card full'><h3>Settings that differ</h3>{table(head, rows(differ))}</div>"
    yield details("All settings", table(head, rows(names)))
