"""docs/faults.md's table, made from the stored lines: `python -m benchmarks.faults page`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import msgspec
from msgspec import Struct

from benchmarks.page_table import put_table

__all__ = ["write_page"]


class _Bounds(Struct, frozen=True):
    at_most: dict[str, float]
    at_least: dict[str, float]


class _Stored(Struct, frozen=True):
    """A row's own line, as `benchmarks.faults` writes it."""

    wall_s: float
    figures: dict[str, float | str]
    bounds: _Bounds
    failures: list[str]


def write_page(rows: Mapping[str, str], results: Path, page: Path) -> None:
    """rows: name -> what is done; a row of which nothing is stored is left out."""
    stored = {name: found for name in rows if (found := _stored(results / f"{name}.jsonl"))}
    put_table(
        page,
        "python -m benchmarks.faults page",
        ("row", "what is done", "none of", "other bounds", "holds", "time"),
        (_row(name, rows[name], found) for name, found in stored.items()),
        left=5,
    )


def _stored(path: Path) -> _Stored | None:
    lines = path.read_bytes().splitlines() if path.is_file() else []
    found = [line for line in lines if b'"wall_s"' in line and b'"bounds"' in line]
    return msgspec.json.decode(found[-1], type=_Stored) if found else None


def _row(name: str, what: str, found: _Stored) -> tuple[str, ...]:
    never = [figure for figure, bound in found.bounds.at_most.items() if bound == 0]
    return (
        f"`{name}`",
        what,
        _words(never),
        "; ".join(_bounded(found)),
        "yes" if not found.failures else "**no**: " + _words(f.split(" ")[0] for f in found.failures),
        f"{found.wall_s / 60:.0f} min",
    )


def _bounded(found: _Stored) -> Iterator[str]:
    for figure, bound in found.bounds.at_most.items():
        if bound:
            yield f"{_words([figure])} {_number(found.figures[figure])} (at most {_number(bound)})"
    for figure, bound in found.bounds.at_least.items():
        yield f"{_words([figure])} {_number(found.figures[figure])} (at least {_number(bound)})"


def _words(names: Iterator[str] | list[str]) -> str:
    return ", ".join(name.replace("_", " ") for name in names)


def _number(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:,.3g}" if value < 100 else f"{value:,.0f}"
