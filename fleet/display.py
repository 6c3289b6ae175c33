"""Rounds as they happen, for people (rich)."""

from __future__ import annotations

from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from fleet.demo import RoundReport
from fleet.run_files import VersionLine

__all__ = ["FleetDisplay", "RoundDisplay"]

_BAR = 16


class _Display:
    """A progress bar at the bottom where there is a terminal, and lines above it."""

    def __init__(self, total: int | None) -> None:
        """total: rounds; None where nobody knows."""
        self._console = Console()
        columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
        self._progress = Progress(*columns, console=self._console, transient=True)
        self._task = self._progress.add_task("preparing", total=total)

    def __enter__(self) -> Self:
        if self._console.is_terminal:  # else its end would be an empty line
            self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._console.is_terminal:
            self._progress.stop()

    def say(self, stage: str) -> None:
        self._console.print(f"· {stage}")


class RoundDisplay(_Display):
    """One line a round, with a bar of its accuracy."""

    def show(self, report: RoundReport) -> None:
        bar = "█" * round(_BAR * report.accuracy)
        self._console.print(
            f"round {report.round:3d} {report.accuracy:6.1%} [green]{bar:<{_BAR}}[/green] "
            f"{report.updates:2d} updates,{report.uplink_bytes / 1e6:5.1f} MB up,"
            f"{report.downlink_bytes / 1e6:6.1f} MB down,{report.wall_s:4.0f} s",
            highlight=False,
        )
        self._progress.update(self._task, completed=report.round, description=f"round {report.round + 1}")


class FleetDisplay(_Display):
    """One line for each version that was judged; the bar counts them all."""

    def show(self, line: VersionLine) -> None:
        if line.loss is not None:
            accuracy = "      " if line.accuracy is None else f"{line.accuracy:6.1%}"
            self._console.print(
                f"version {line.version:4d} {accuracy} loss {line.loss:7.4f} "
                f"{line.sent_bytes / 1e6:8.2f} MB up {line.received_bytes / 1e6:8.2f} MB down "
                f"{line.virtual_s / 3600:8.2f} h",
                highlight=False,
            )
        self._progress.update(
            self._task, completed=line.version, description=f"round {(line.round or 0) + 1}"
        )

    def show_seen(self, line: VersionLine) -> None:
        """One line for each version that devices of this fleet were given, by a server elsewhere."""
        sent, received = f"{line.sent_bytes / 1e6:8.2f} MB up", f"{line.received_bytes / 1e6:8.2f} MB down"
        taken = f"{line.outcomes.get('acknowledged', 0):6d} updates taken"
        self._console.print(
            f"version {line.version:4d} {taken} {sent} {received} {line.wall_s:6.0f} s", highlight=False
        )
        self._progress.update(self._task, description=f"round {line.round}")
