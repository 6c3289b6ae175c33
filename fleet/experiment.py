"""An experiment made ready: all that a fleet file names is opened and checked before anything starts."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import msgspec
from msgspec.structs import replace

from edge_client.bundle import Bundle, needed_files, open_bundle
from edge_client.examples import Example
from edge_client.files import file_digest
from edge_client.onnx_runtime import onnx_runtimes
from edge_client.runtime import Runtimes
from fedtt.errors import ConfigError
from fleet.able import check_able
from fleet.availability import Always, Availability, Nightly, Trace, read_trace
from fleet.conditions import Daily
from fleet.data import RowShard, deal, read_labelled
from fleet.emulated import SharedBundle
from fleet.pools import check_pool
from fleet.population import Population
from fleet.spec import AlwaysSpec, FleetSpec, NightlySpec, NoneSpec, TraceSpec

__all__ = ["START_S", "Experiment", "prepare"]

START_S = 1_767_225_600.0  #: when every run begins by its own clock: 2026-01-01 00:00 UTC


@dataclass(frozen=True, eq=False, kw_only=True)
class Experiment:
    """What runs are made from: one may follow another, and none leaves anything here."""

    spec: FleetSpec
    bundle: Bundle
    shards: Sequence[RowShard]
    evaluation: Sequence[Example] | None
    population: Population  #: as it is before a run, which makes its own `anew`
    availability: Availability
    conditions: Daily | None  #: what devices read of themselves
    fingerprint: str  #: equal where two runs give the same bits

    def shared_bundle(self) -> SharedBundle:
        entries = needed_files(self.bundle.manifest, "onnxruntime").values()
        return SharedBundle(self.bundle, sum(entry.bytes for entry in entries))

    def judges(self) -> Runtimes | None:
        """What emulated devices judge versions with; None where the task asks none to."""
        return onnx_runtimes(self.spec.fleet.threads) if self.spec.task.evaluation else None


def prepare(spec: FleetSpec) -> Experiment:
    """Raises ConfigError, DataError or BundleError where something is missing or makes no sense."""
    bundle = open_bundle(spec.bundle)
    bundle.first_theta()  # is there, and sound
    check_pool(spec.fleet.chosen_trainer, bundle, spec.fleet.model)
    labels = bundle.manifest.labels
    _check_task(spec, bundle)
    table = read_labelled(spec.data.train, labels)
    population = Population(
        size=spec.fleet.devices, shards=spec.shards, profiles=spec.profiles, seed=spec.fleet.seed
    )
    shards = deal(spec, table, labels)
    if spec.fleet.bound is None:
        check_able(spec.task, population, shards)
    return Experiment(
        spec=spec,
        bundle=bundle,
        shards=shards,
        evaluation=read_labelled(spec.evaluation.data, labels) if spec.evaluation else None,
        population=population,
        availability=_availability(spec, population),
        conditions=_conditions(spec, population),
        fingerprint=_fingerprint(spec, bundle),
    )


def _check_task(spec: FleetSpec, bundle: Bundle) -> None:
    """Raise ConfigError, with the field as a fleet file has it, where the task cannot train the bundle."""
    try:
        spec.task.check(bundle.manifest.adapter)
    except ConfigError as error:
        raise ConfigError(f"task.{error.field}", error.value, error.allowed, error.where) from None


def _availability(spec: FleetSpec, population: Population) -> Availability:
    match spec.availability:
        case AlwaysSpec():
            return Always()
        case NightlySpec() as nightly:
            return Nightly(nightly, seed=spec.fleet.seed, on_battery=_OnBattery(population))
        case TraceSpec() as trace:
            return Trace(read_trace(trace.file, spec.fleet.devices), START_S)


def _conditions(spec: FleetSpec, population: Population) -> Daily | None:
    if isinstance(spec.conditions, NoneSpec):
        return None
    return Daily(spec.conditions, seed=spec.fleet.seed, on_battery=_OnBattery(population))


class _OnBattery(Sequence[bool]):
    """Whether each device of a population runs on battery."""

    def __init__(self, population: Population) -> None:
        self._kind = population.profile
        self._by_kind = [profile.power == "battery" for profile in population.profiles]

    def __len__(self) -> int:
        return len(self._kind)

    def __getitem__(self, index: int) -> bool:  # type: ignore[override]  # no slices are asked for
        return self._by_kind[int(self._kind[index])]


def _fingerprint(spec: FleetSpec, bundle: Bundle) -> str:
    """sha256 over the settings and the contents, not the places, of all that a run is made from.

    The bundle says of which model it is, so the model's place counts only as far as it chooses a trainer.
    """
    files = [spec.data.train]
    files += [spec.evaluation.data] if spec.evaluation else []
    files += [spec.availability.file] if isinstance(spec.availability, TraceSpec) else []
    size = replace(spec.fleet, model=None, trainer=spec.fleet.chosen_trainer)
    settings = msgspec.json.encode(replace(spec, fleet=size), enc_hook=lambda _: None, order="deterministic")
    parts = [version("fedtt").encode(), settings, bundle.digest.encode()]
    parts += [file_digest(Path(file)).encode() for file in files]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()
