"""Examples from files that people have: JSONL, or CSV with a header, in UTF-8.

Each row has a `text`, perhaps a second one that it is read together with (`text_pair`), and perhaps a
`label` (a name or an index); other columns are not read.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import msgspec

from edge_client.examples import Example
from fedtt.errors import DataError

__all__ = ["read_examples"]

_Rows = Iterator[tuple[int, dict[str, Any]]]  #: row numbers as an editor shows them, and fields


def read_examples(path: Path) -> list[Example]:
    """Every row of a .jsonl or .csv file; raises DataError that names the file and the row."""
    readers = {".jsonl": _json_rows, ".csv": _csv_rows}
    if path.suffix.lower() not in readers:
        raise DataError(f"{path}: examples are read from .jsonl and .csv files")
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = readers[path.suffix.lower()](path, file)
            found = [_example(path, number, row) for number, row in rows]
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}): check the name and its rights") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 ({error.reason}): save it as UTF-8") from None
    if not found:
        raise DataError(f"{path} holds no examples: one row each, with a text and perhaps a label")
    return found


def _json_rows(path: Path, lines: Iterable[str]) -> _Rows:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            yield number, msgspec.json.decode(line, type=dict[str, Any])
        except (msgspec.DecodeError, RecursionError) as error:
            raise DataError(f"{path} row {number} is not a JSON object: {error}") from None


def _csv_rows(path: Path, lines: Iterable[str]) -> _Rows:
    reader = csv.DictReader(lines)
    try:
        if reader.fieldnames is not None and "text" not in reader.fieldnames:
            raise DataError(
                f"{path} row 1 is a header without a column 'text': {', '.join(reader.fieldnames)}"
            )
        for row in reader:
            fields = {name: row.get(name) or None for name in ("text_pair", "label")}
            yield reader.line_num, {"text": row["text"], **fields}
    except csv.Error as error:
        raise DataError(f"{path} row {reader.line_num} is not CSV: {error}") from None


def _example(path: Path, number: int, row: dict[str, Any]) -> Example:
    where = f"{path.name} row {number}"
    text, pair, label = row.get("text"), row.get("text_pair"), row.get("label")
    if not isinstance(text, str) or not text.strip():
        raise DataError(f"{where} has no text: give it a field 'text' that is not empty")
    if pair is not None and not (isinstance(pair, str) and pair.strip()):
        raise DataError(f"{where} has an empty 'text_pair': leave it out where there is no second text")
    if isinstance(label, bool) or not isinstance(label, str | int | None):
        raise DataError(f"{where} has label {label!r}: a label is a name or an index")
    return Example(text, label, where, pair)
