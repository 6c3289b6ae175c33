"""What people see in a terminal: tables and the progress of an upload (rich)."""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TextColumn, TransferSpeedColumn
from rich.table import Table

__all__ = ["settings", "table", "upload_progress"]


def table(rows: list[dict[str, Any]], columns: tuple[str, ...]) -> None:
    """Print the chosen columns; times as local time, hashes cut short."""
    view = Table(box=None, pad_edge=False)
    for column in columns:
        view.add_column(column.removesuffix("_at").replace("_", " "))
    for row in rows:
        view.add_row(*(_cell(column, row.get(column)) for column in columns))
    Console().print(view if rows else "(none)")


def settings(spec: dict[str, Any]) -> None:
    """Print a task's settings in the words of its file, a section a line; one without any is left out."""
    single = {name: value for name, value in spec.items() if not isinstance(value, dict) and name != "name"}
    sections = {name: value for name, value in spec.items() if isinstance(value, dict)}
    for name, values in {"task": single, **sections}.items():
        given = [f"{key} = {json.dumps(value)}" for key, value in values.items() if value is not None]
        if given:
            print(f"[{name}]".ljust(max(map(len, sections)) + 2), ", ".join(given))


def _cell(column: str, value: object) -> str:
    if value is None or value == "":
        return "-"
    if column.endswith("_at") and isinstance(value, float):
        moment = datetime.datetime.fromtimestamp(value).astimezone()
        return moment.strftime("%Y-%m-%d %H:%M:%S")
    if isinstance(value, float):
        return f"{value:.4f}"
    return str(value)[:16] if column in {"sha256", "id"} else str(value)


@contextmanager
def upload_progress(*, quiet: bool) -> Iterator[Callable[[str, int, int], None] | None]:
    """A bar for each file on stderr, where stderr is a terminal."""
    console = Console(stderr=True)
    if quiet or not console.is_terminal:
        yield None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=console, transient=True) as bars:
        known: dict[str, TaskID] = {}

        def progress(name: str, sent: int, size: int) -> None:
            if name not in known:
                known[name] = bars.add_task(f"sending {name}", total=size)
            bars.update(known[name], completed=sent)

        yield progress
