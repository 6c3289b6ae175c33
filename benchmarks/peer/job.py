"""What one program is asked to do, what it answers, and the data that all of them read."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import msgspec
import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

__all__ = [
    "Answer",
    "Data",
    "Job",
    "PrefixKind",
    "Products",
    "Training",
    "batches",
    "read_answer",
    "read_job",
    "write",
]

PrefixKind = Literal["none", "frozen", "cached"]  #: how what lies below all adapters is computed
Products = Literal["fp32", "int8"]  #: of the frozen matrices
Theta = NDArray[np.float32]
Rows = NDArray[np.intp]


class Training(Struct, frozen=True, kw_only=True):
    """A real job: local training of a bundle's adapters."""

    bundle: Path  #: its manifest says what is trained
    model: Path  #: the encoder's directory
    data: Path  #: of `Data`
    fleet: Path  #: the same job as a fleet file, for ours
    prefix: PrefixKind
    learning_rate: float
    local_steps: int
    batch_size: int


class Job(Struct, frozen=True, kw_only=True):
    """Rounds of a cohort each; the first is not counted."""

    devices: int
    cohort: int
    rounds: int  #: beside the first
    seed: int
    processes: int  #: that train, of `threads` each
    threads: int
    scratch: Path  #: an empty directory
    numbers: int = 1000  #: of the update, where nothing is trained
    training: Training | None = None  #: None for devices that train nothing


class Answer(Struct, frozen=True, kw_only=True):
    """What a program measured."""

    updates: int  #: folded after the first round
    wall_s: float  #: from the end of the first round to the end of the last
    late_updates: int  #: the same for the last third of the rounds
    late_wall_s: float
    losses: list[float]  #: of each round: the cohort's mean loss in its last local step; empty where none
    theta: Path | None = None  #: the last version as .npy, where something was trained

    @classmethod
    def of(
        cls, round_ends_s: list[float], cohort: int, losses: list[float], theta: Path | None = None
    ) -> Answer:
        """round_ends_s: by any clock, the first round's included."""
        last = len(round_ends_s) - 1
        late = last - max(1, last // 3)
        return cls(
            updates=cohort * last,
            wall_s=round_ends_s[last] - round_ends_s[0],
            late_updates=cohort * (last - late),
            late_wall_s=round_ends_s[last] - round_ends_s[late],
            losses=losses,
            theta=theta,
        )


def write(path: Path, value: Job | Answer) -> None:
    path.write_bytes(msgspec.json.encode(value, enc_hook=str))


def read_job(path: Path) -> Job:
    return msgspec.json.decode(path.read_bytes(), type=Job, dec_hook=_path)


def read_answer(path: Path) -> Answer:
    return msgspec.json.decode(path.read_bytes(), type=Answer, dec_hook=_path)


def _path(_: type, value: str) -> Path:
    return Path(value)


class Data:
    """Token ids of every row, with the rows of every device and the first factors; one .npz."""

    def __init__(self, path: Path) -> None:
        with np.load(path) as file:
            self.rows = np.split(file["ids"].astype(np.int64), np.cumsum(file["lengths"])[:-1])
            self.labels = file["labels"].astype(np.int64)  #: (rows,)
            self.shards = np.split(file["shards"], np.cumsum(file["shard_lengths"])[:-1])
            self.theta: Theta = file["theta"]

    @staticmethod
    def write(
        path: Path, rows: list[list[int]], labels: list[int], shards: list[list[int]], theta: Theta
    ) -> None:
        np.savez(
            path,
            ids=np.concatenate([np.array(row, np.int32) for row in rows]),
            lengths=np.array(list(map(len, rows))),
            labels=np.array(labels, np.int32),
            shards=np.concatenate([np.array(shard, np.int32) for shard in shards]),
            shard_lengths=np.array(list(map(len, shards))),
            theta=theta,
        )


def batches(shard: Rows, size: int, steps: int, rng: np.random.Generator) -> Iterator[Rows]:
    """Shuffled epochs, the last batch of each perhaps short: what `edge_client.trainer` does."""
    while True:
        order = rng.permutation(shard)
        for start in range(0, len(order), size):
            if steps == 0:
                return
            steps -= 1
            yield order[start : start + size]
