"""Data sets beside the project, as the files a fleet reads: rows to train on, to choose by, to report on."""

from __future__ import annotations

import gzip
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.harness import ROOT, shared_data
from fedtt.rng import Purpose, rng_for

__all__ = ["WORK", "DataSet", "prepared"]

WORK = ROOT / ".bench" / "claims"
_HELD_OUT = 10  #: one in so many training rows stands in for a development file where there is none


@dataclass(frozen=True, kw_only=True)
class DataSet:
    """Files of one data set, and what its labels are called."""

    train: Path
    search: Path  #: settings are chosen by these rows
    test: Path  #: and reported on these
    labels: tuple[str, ...]  #: none for language modelling
    answers: tuple[int, ...] = ()  #: the test rows' labels


def prepared(name: str, *, train_rows: int | None = None, judged_rows: int | None = None) -> DataSet:
    """The files of one set under `WORK`, written when first asked for.

    Settings are chosen on the development file, or on a tenth of the training rows where the development
    file is all there is to report on. `train_rows` and `judged_rows` keep the first so many after a shuffle.
    """
    source, directory = shared_data(f"data/{name}"), WORK / "data" / f"{name}-{train_rows}-{judged_rows}"
    names = json.loads((source / "labels.json").read_text())["labels"]
    if name == "clinc150":
        names = names[:150]  # the rest is out of scope
    train, has_test = _rows(source / "train.jsonl.gz"), (source / "test.jsonl.gz").is_file()
    shuffled = _shuffled(train)
    if has_test and (source / "dev.jsonl.gz").is_file():
        search, test = _rows(source / "dev.jsonl.gz"), _rows(source / "test.jsonl.gz")
    else:
        cut = len(shuffled) // _HELD_OUT
        search, shuffled = shuffled[:cut], shuffled[cut:]
        test = _rows(source / ("test.jsonl.gz" if has_test else "dev.jsonl.gz"))
    search, test = (_by_length(_shuffled(rows)[:judged_rows]) for rows in (search, test))
    parts = {"train": shuffled[:train_rows], "search": search, "test": test}
    directory.mkdir(parents=True, exist_ok=True)
    for part, rows in parts.items():
        path = directory / f"{part}.jsonl"
        if not path.is_file():
            path.write_text("".join(json.dumps(_named(row, names)) + "\n" for row in rows))
    files = {part: directory / f"{part}.jsonl" for part in parts}
    return DataSet(**files, labels=tuple(names), answers=tuple(row["label"] for row in test))


def _shuffled(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [rows[i] for i in rng_for(0, Purpose.PARTITION).permutation(len(rows)).tolist()]


def _by_length(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """So that batches are judged with little padding."""
    return sorted(rows, key=lambda row: len(row["text"]) + len(row.get("text_pair") or ""))


def _rows(path: Path) -> list[dict[str, Any]]:
    with gzip.open(path, "rt") as file:
        return [json.loads(line) for line in file]


def _named(row: dict[str, Any], names: list[str]) -> dict[str, Any]:
    """Rows of language modelling carry label -1."""
    return {**row, "label": names[row["label"]] if row["label"] >= 0 else None}
