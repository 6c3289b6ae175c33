"""What a run leaves in its directory.

settings.json          the experiment's settings, defaults too
versions.jsonl         one object for each version, as it appears (`VersionLine`)
participations.jsonl   the names of the columns, then one array for each piece of work (`fleet.participation`)
devices.jsonl          one object for each device that took part or was judged (`DeviceLine`), at the end
summary.json           `Outcome`, at the end
report.html            all of it in plots (`fleet.report`), by `fedtt fleet run`
result/                the last version, as `fedtt predict` and `fedtt evaluate` read it
computed.sqlite        what need not be computed again (`fleet.computed`)
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import IO, Self

import msgspec
import numpy as np
from msgspec import Struct

from edge_client.files import try_lock
from edge_client.inference import Evaluation
from fedtt.errors import ConfigError, StorageError
from fleet.participation import COLUMNS, Row
from fleet.population import Population
from fleet.spec import FleetSpec

__all__ = [
    "DeviceLine",
    "Outcome",
    "RunFiles",
    "Spread",
    "VersionLine",
    "check_unused",
    "own_directory",
    "spread",
]


class Spread(Struct, frozen=True, kw_only=True):
    """How something is distributed over the devices that took part."""

    devices: int
    least: float
    median: float
    most: float
    gini: float  #: 0 where all have the same, towards 1 where one has everything


class VersionLine(Struct, frozen=True, kw_only=True):
    """One version. Counts and bytes are of the whole run so far; bytes are those of bodies."""

    version: int
    round: int | None
    sha256: str  #: empty where nobody knows it
    virtual_s: float  #: since the run began
    wall_s: float  #: the same by the clock on the wall, of this process
    updates: int  #: folded into it; 0 against another server, which tells devices nothing of that
    examples: int  #: they stand for
    staleness: dict[int, int]  #: versions that a base was old -> updates of it
    train_loss_first: float | None
    train_loss_last: float | None
    loss: float | None  #: on the evaluation data; None where it was not judged
    accuracy: float | None
    check_ins: int = 0  #: of all devices
    sent_bytes: int
    received_bytes: int  #: without bundles
    bundle_bytes: int
    frame_bytes: int
    trained: int = 0  #: trainings that came to an update, whose frames these bytes are
    outcomes: dict[str, int]  #: what came of the work given out
    participations: Spread | None  #: acknowledged updates of each device
    report: dict[str, float]  #: what the method measured

    @property
    def update_bytes(self) -> float | None:
        """Of one update's frame, the mean until then; None before the first."""
        return self.frame_bytes / self.trained if self.trained > 0 else None


class Outcome(Struct, frozen=True, kw_only=True):
    """What a run ends with."""

    task: str
    state: str  #: of the task; "interrupted" where the run was stopped and may be gone on with
    reason: str
    versions: int | None  #: against another server the newest that a device was given; None for none
    sha256: str | None  #: of the last version
    accuracy: float | None
    loss: float | None
    virtual_s: float
    wall_s: float
    devices: int
    took_part: int  #: devices with an acknowledged update
    left_out: dict[str, int]  #: devices that could not take part, by reason
    outcomes: dict[str, int]
    steps: int
    check_ins: int = 0
    sent_bytes: int
    received_bytes: int
    bundle_bytes: int
    frame_bytes: int
    directory: str


class DeviceLine(Struct, frozen=True, kw_only=True):
    """One device. It was judged on some of its own examples, if at all."""

    device: int
    profile: str
    shard: int
    participations: int  #: acknowledged updates
    sent_bytes: int
    received_bytes: int  #: without bundles
    left_out: bool
    examples: int = 0  #: of its own, that the last version was judged on
    loss: float | None = None
    accuracy: float | None = None
    #: of what it trained by itself (`fleet.bound`), on the evaluation data
    alone_loss: float | None = None
    alone_accuracy: float | None = None


def spread(counts: np.ndarray[tuple[int], np.dtype[np.int32]]) -> Spread | None:
    """Over those above zero; None where there is none."""
    some = np.sort(counts[counts > 0]).astype(np.float64)
    n = len(some)
    if not n:
        return None
    gini = float((2 * np.arange(1, n + 1) - n - 1) @ some / (n * some.sum()))
    return Spread(
        devices=n,
        least=float(some[0]),
        median=float(np.median(some)),
        most=float(some[-1]),
        gini=round(gini, 4),
    )


class RunFiles:
    """The files of a run that is under way; written anew by whoever goes on with it."""

    def __init__(self, directory: Path, stack: ExitStack) -> None:
        self.directory = directory
        for name in (
            "summary.json",
            "devices.jsonl",
            "report.html",
        ):  # of an earlier life, which went further
            (directory / name).unlink(missing_ok=True)
        self._versions = stack.enter_context(_written(directory / "versions.jsonl"))
        self._participations = stack.enter_context(_written(directory / "participations.jsonl"))
        self._participations.write(msgspec.json.encode(COLUMNS) + b"\n")

    @classmethod
    @contextmanager
    def open(cls, directory: Path) -> Iterator[Self]:
        with ExitStack() as stack:
            yield cls(directory, stack)

    def settings(self, spec: FleetSpec) -> None:
        encoded = msgspec.json.encode(spec, enc_hook=str)  # paths
        (self.directory / "settings.json").write_bytes(msgspec.json.format(encoded, indent=2) + b"\n")

    def version(self, line: VersionLine) -> None:
        self._versions.write(msgspec.json.encode(line) + b"\n")
        self._versions.flush()
        self._participations.flush()

    def participation(self, row: Row) -> None:
        self._participations.write(msgspec.json.encode(row) + b"\n")

    def result(self, files: dict[str, bytes]) -> None:
        directory = self.directory / "result"
        directory.mkdir(exist_ok=True)
        for name, data in files.items():
            (directory / name).write_bytes(data)

    def end(
        self,
        outcome: Outcome,
        population: Population,
        judged: Mapping[int, Evaluation] = MappingProxyType({}),
        alone: Mapping[int, Evaluation] = MappingProxyType({}),
    ) -> None:
        """judged: device -> the last version on its own examples, where that was asked for.

        alone: device -> what it trained by itself, on the evaluation data.
        """
        (self.directory / "summary.json").write_bytes(
            msgspec.json.format(msgspec.json.encode(outcome), indent=2) + b"\n"
        )
        with _written(self.directory / "devices.jsonl") as file:
            for index in sorted({*np.flatnonzero(population.sent_bytes).tolist(), *judged, *alone}):
                line = _device_line(population, index, judged.get(index), alone.get(index))
                file.write(msgspec.json.encode(line) + b"\n")


def _device_line(
    population: Population, index: int, judged: Evaluation | None, alone: Evaluation | None
) -> DeviceLine:
    return DeviceLine(
        device=index,
        profile=population.profiles[population.profile[index]].name,
        shard=int(population.shard[index]),
        participations=int(population.participations[index]),
        sent_bytes=int(population.sent_bytes[index]),
        received_bytes=int(population.received_bytes[index]),
        left_out=bool(population.left_out[index]),
        examples=judged.examples if judged else 0,
        loss=judged.loss if judged else None,
        accuracy=judged.accuracy if judged else None,
        alone_loss=alone.loss if alone else None,
        alone_accuracy=alone.accuracy if alone else None,
    )


def check_unused(directory: Path) -> None:
    """Raise ConfigError where files of a run lie that nobody can go on with."""
    if (directory / "versions.jsonl").exists():
        allowed = "a directory without the results of an earlier run; --fresh writes over them"
        raise ConfigError("--dir", str(directory), allowed)


@contextmanager
def own_directory(directory: Path) -> Iterator[None]:
    """Be the only run in a directory."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        descriptor = try_lock(directory / "lock")
    except OSError as error:
        raise StorageError(f"{directory} cannot be used ({error.strerror}): name another --dir") from None
    if descriptor is None:
        raise StorageError(f"another run is under way in {directory}: name another --dir")
    try:
        yield
    finally:
        os.close(descriptor)


@contextmanager
def _written(path: Path) -> Iterator[IO[bytes]]:
    try:
        with path.open("wb") as file:
            yield file
    except BrokenPipeError:
        raise  # of whoever reads our lines, not of this file
    except OSError as error:
        raise StorageError(f"{path} cannot be written ({error.strerror}): check disk and rights") from None
