"""What methods over tensor trains ask of an adapter."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from fedtt.adapter import AdapterSpec, TTFactors
from fedtt.errors import ConfigError

__all__ = ["Side", "check_trains", "outside_trains", "sided_trains"]

Side = Literal["down", "up", "head"]


def check_trains(adapter: AdapterSpec, name: str, *, whole_head: bool = False) -> None:
    """Raise ConfigError where a method that chooses among the cores of trains would find none.

    whole_head: it leaves those of the head together, so both the head and what is beside it must be trains.
    """
    sides = {side for side, _ in sided_trains(adapter)}
    if not sides:
        raise ConfigError("method.name", name, "only for a bundle whose adapters or head are tensor trains")
    if whole_head and not sides > {"head"}:
        raise ConfigError(
            "method.whole_head", True, "only for a bundle whose adapters and head are tensor trains"
        )


def outside_trains(adapter: AdapterSpec) -> tuple[int, ...]:
    """The factors that are no core: biases, dense matrices, LoRA's pairs."""
    cores = {index for train in adapter.tt_matrices for index in train.indices}
    return tuple(index for index in range(len(adapter.layout.factors)) if index not in cores)


def sided_trains(adapter: AdapterSpec) -> Iterator[tuple[Side, TTFactors]]:
    """Every train and where it stands: a bottleneck's two follow each other, `down` first."""
    for number, train in enumerate(adapter.tt_matrices):
        in_block = adapter.block_of(train.indices[0]) is not None
        yield ("up" if number % 2 else "down") if in_block else "head", train
