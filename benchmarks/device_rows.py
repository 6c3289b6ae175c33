"""The rows of `benchmarks.device`, and those kept of a run that was cut off."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import msgspec
from msgspec import Struct
from msgspec.structs import replace

from benchmarks.harness import machine

__all__ = ["BASES", "PRODUCTS", "SHAPES", "Kept", "Kind", "Row", "bases_of", "has_limit", "rows"]

PRODUCTS = "int8-products"  #: a base in int8, multiplied in int8
BASES = ("fp32", "fp16", "int8", PRODUCTS)
SHAPES = ((8, 64), (16, 128))
DEPTHS = (None, 3, 2, 1)
TURNS = 3  #: of steps with a limit; all else is taken once

Part = Literal["step", "round"]
Kind = Literal["onnxruntime", "executorch", "torch", "peft"]
PARTS: tuple[Part, ...] = ("step", "round")


class Row(Struct, frozen=True, kw_only=True):
    """What one process does."""

    part: Part
    runtime: Kind
    base: str = "fp32"
    depth: int | None = None  #: blocks trained; None for all
    cached: bool = False  #: what lies below them is read from files
    batch: int
    tokens: int
    turn: int = 0


def rows(kinds: Sequence[Kind]) -> Iterator[Row]:
    """Those that are compared follow one another, so that the machine is the same to them."""
    for turn, (batch, tokens), part, depth in itertools.product(range(TURNS), SHAPES, PARTS, DEPTHS):
        for kind in kinds:
            for base in bases_of(kind):
                row = Row(
                    part=part, runtime=kind, base=base, depth=depth, batch=batch, tokens=tokens, turn=turn
                )
                found = [row, replace(row, cached=True)] if _keeps(row) else [row]
                yield from (row for row in found if not turn or (part == "step" and has_limit(row)))


def _keeps(row: Row) -> bool:
    """Whether there is something below the trained blocks that a device may keep."""
    return row.depth is not None and row.runtime in ("onnxruntime", "executorch")


def bases_of(kind: Kind) -> tuple[str, ...]:
    match kind:
        case "onnxruntime" | "executorch":
            return BASES
        case _:
            return BASES[:1]


def has_limit(row: Row) -> bool:
    """Whether a figure with a limit is made of it: 8 x 64 tokens, full, or the last two blocks and cached."""
    if (row.batch, row.tokens) != SHAPES[0]:
        return False
    cached = row.depth == 2 and row.cached
    if row.part == "round":  # whose peak counts
        return cached and row.base != "fp16"
    return row.base in ("fp32", PRODUCTS) and (cached or row.depth is None)


class Kept:
    """Rows measured before on this machine, so that a run that was cut off is gone on with."""

    def __init__(self, path: Path, *, fresh: bool) -> None:
        self._path, self._machine = path, machine()
        if fresh:
            path.unlink(missing_ok=True)
        path.parent.mkdir(exist_ok=True)

    def __enter__(self) -> Kept:
        text = self._path.read_bytes() if self._path.exists() else b""
        whole = text[: text.rfind(b"\n") + 1]
        self._path.write_bytes(whole)  # without a line that was cut off
        self._found: dict[bytes, dict[str, float]] = {}
        for line in map(json.loads, whole.splitlines()):
            if line["machine"] == self._machine:
                self._found[as_key(line["row"])] = line["found"]
        self._file = self._path.open("a")
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def get(self, row: dict[str, Any]) -> dict[str, float] | None:
        return self._found.get(as_key(row))

    def put(self, row: dict[str, Any], found: dict[str, float]) -> dict[str, float]:
        line = {"machine": self._machine, "row": row, "found": found}
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        return found


def as_key(row: dict[str, Any]) -> bytes:
    return msgspec.json.encode(row, order="sorted")
