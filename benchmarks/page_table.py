"""Tables in documents that a benchmark makes from its stored lines, between marks that name the command."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

__all__ = ["put_table"]


def put_table(
    page: Path, command: str, headings: Sequence[str], rows: Iterable[Sequence[str]], *, left: int = 1
) -> None:
    """Replace the table between `command`'s marks; what stands around it is written by hand.

    left: how many columns are words; the others are numbers, set to the right. Raises ValueError where the
    page has no such marks.
    """
    begin, end = f"<!-- table: {command} -->", "<!-- end of the table -->"
    before, _, rest = page.read_text().partition(begin)
    _, found, after = rest.partition(end)
    if not found:
        raise ValueError(f"{page} has no table marked with {begin}")
    lines = [
        f"| {' | '.join(headings)} |",
        f"|{'---|' * left}{'---:|' * (len(headings) - left)}",
        *(f"| {' | '.join(row)} |" for row in rows),
    ]
    page.write_text(f"{before}{begin}\n\n" + "\n".join(lines) + f"\n\n{end}{after}")
