"""FleetSpec: one emulated experiment, whose settings are refused where they make no sense (docs/fleet.md)."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from msgspec import Meta, Struct

from edge_client.conditions import Limits
from fedtt.algorithms.hier_fedlora import Hierarchical
from fedtt.errors import ConfigError
from fedtt.task import TaskSpec
from fleet.faults import FaultSpec
from fleet.profiles import Profile

__all__ = [
    "AlwaysSpec",
    "AvailabilitySpec",
    "ByUser",
    "ConditionsSpec",
    "DailySpec",
    "DataSpec",
    "Dirichlet",
    "EvaluationSpec",
    "FewLabels",
    "FleetFile",
    "FleetSpec",
    "Iid",
    "Lognormal",
    "NightlySpec",
    "NightsSpec",
    "NoneSpec",
    "PartitionSpec",
    "Size",
    "TraceSpec",
    "Zipf",
    "steps_alone",
]

_MOST_STEPS = 100_000  #: of one training, `training.local_steps`
Positive = Annotated[int, Meta(ge=1, le=10**7)]
Seconds = Annotated[float, Meta(gt=0, le=10**9)]


class _Section(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of all sections."""


class Size(_Section, frozen=True, kw_only=True):
    """[fleet]"""

    devices: Positive
    seed: Annotated[int, Meta(ge=0, le=2**53)] = 0
    trainer: str | None = None  #: of `fleet.pools.POOLS`; None leaves it to `chosen_trainer`
    model: str | None = None  #: directory or hub id of what the bundle is of, which batched trainers compile
    threads: Annotated[int, Meta(ge=1, le=1024)] = 2  #: that train and judge
    last_s: Seconds = 30 * 86400.0  #: most virtual time of a run
    first_visits_s: Seconds | None = None  #: in which all devices come for the first time; None for one pause
    visit_every_s: Seconds | None = None  #: mean between two visits; None comes whenever the server said
    needs_memory_mb: Annotated[int, Meta(ge=0)] = 0  #: of training; devices that say they have less cannot
    bound: Literal["local-only", "centralised"] | None = None  #: what is lived in place of a federation

    @property
    def chosen_trainer(self) -> str:
        """The one that is named; else the faster one, where a model is named that it can be compiled from."""
        if self.trainer is not None:
            return self.trainer
        return "one-by-one" if self.model is None else "batched"


class _Partition(_Section, frozen=True, kw_only=True, tag_field="kind"):
    """[data.partition]"""

    least: Positive | None = None  #: rows that each device must get; None for the task's min_examples


class Iid(_Partition, frozen=True, kw_only=True, tag="iid"):
    """Shuffled, in equal parts."""


class Dirichlet(_Partition, frozen=True, kw_only=True, tag="dirichlet"):
    """The share of each label over devices is drawn from Dir(alpha)."""

    alpha: float


class FewLabels(_Partition, frozen=True, kw_only=True, tag="labels"):
    """Exactly so many labels on each device."""

    labels_each: int


class Lognormal(_Partition, frozen=True, kw_only=True, tag="lognormal"):
    """Sizes in proportion to exp(sigma z)."""

    sigma: float


class Zipf(_Partition, frozen=True, kw_only=True, tag="zipf"):
    """Sizes in proportion to 1 / k^exponent."""

    exponent: float


class ByUser(_Partition, frozen=True, kw_only=True, tag="users"):
    """The rows of one `user` each."""


PartitionSpec = Iid | Dirichlet | FewLabels | Lognormal | Zipf | ByUser


class DataSpec(_Section, frozen=True, kw_only=True):
    """[data]"""

    train: Path  #: .jsonl or .csv: `text`, perhaps `text_pair`, `label`, `user`
    partition: PartitionSpec = Iid()
    shards: Positive | None = None  #: into which the rows are dealt, used in turn; None for one a device


class EvaluationSpec(_Section, frozen=True, kw_only=True):
    """[evaluation]"""

    data: Path
    every: Positive = 1  #: versions; the first and the last are always judged
    per_device: Annotated[int, Meta(ge=0, le=10**6)] = 50  #: devices on whose own data the last one is judged
    per_device_examples: Positive = 32  #: of each of them, at most


class AlwaysSpec(_Section, frozen=True, kw_only=True, tag_field="kind", tag="always"):
    """Devices are always there."""


class NightsSpec(_Section, frozen=True, kw_only=True):
    """When devices charge at night (`fleet.availability.Nightly`)."""

    zones_h: float = 24.0
    from_h: float = 22.5
    hours: float = 8.0
    spread_h: float = 1.0


class NightlySpec(NightsSpec, frozen=True, kw_only=True, tag_field="kind", tag="nightly"):
    """Devices on battery are there while they charge at night (`fleet.availability.Nightly`)."""


class TraceSpec(_Section, frozen=True, kw_only=True, tag_field="kind", tag="trace"):
    """Devices are there when a file says so (`fleet.availability`)."""

    file: Path


AvailabilitySpec = AlwaysSpec | NightlySpec | TraceSpec


class NoneSpec(_Section, frozen=True, kw_only=True, tag_field="kind", tag="none"):
    """Devices read nothing of themselves, and no limit holds them back."""


class DailySpec(NightsSpec, frozen=True, kw_only=True, tag_field="kind", tag="daily"):
    """Devices read power, battery and network as their days go (`fleet.conditions.Daily`)."""

    charge_h: float = 3.0  #: in which an empty battery is full
    drain_h: float = 30.0  #: in which a full one is empty
    home_h: float = 3.0  #: at home before it plugs in
    rest_s: float = 600.0  #: before a device looks again whether its owner's limits hold
    watch_s: float = 60.0  #: how often it looks while it works


ConditionsSpec = NoneSpec | DailySpec


class FleetFile(_Section, frozen=True, kw_only=True):
    """What the file holds beside the task."""

    fleet: Size
    bundle: Path
    data: DataSpec
    evaluation: EvaluationSpec | None = None
    profiles: Annotated[tuple[Profile, ...], Meta(min_length=1, max_length=1000)] = (Profile(),)
    availability: AvailabilitySpec = AlwaysSpec()
    conditions: ConditionsSpec = NoneSpec()
    faults: FaultSpec = FaultSpec()


class FleetSpec(FleetFile, frozen=True, kw_only=True):
    """An experiment; its paths are absolute or count from where the program runs."""

    task: TaskSpec

    def __post_init__(self) -> None:
        devices, rounds = self.fleet.devices, self.task.rounds
        if isinstance(self.task.method, Hierarchical):
            self._check_groups(self.task.method)
        if rounds.cohort > devices:
            raise ConfigError("task.rounds.cohort", rounds.cohort, f"at most fleet.devices = {devices}")
        if self.data.shards is not None and self.data.shards > devices:
            raise ConfigError("data.shards", self.data.shards, f"at most fleet.devices = {devices}")
        if self.task.evaluation is not None and self.task.evaluation.by != "devices":
            by = self.task.evaluation.by
            raise ConfigError("task.evaluation.by", by, "'devices': nobody stands beside an emulated server")
        if self.fleet.bound is not None:
            self._check_bound()
        self._check_conditions()
        names = [profile.name for profile in self.profiles]
        for name in names:
            if names.count(name) > 1:
                raise ConfigError("profiles.name", name, "a name of its own for each kind of device")
        if len(names) > devices:
            raise ConfigError("profiles", len(names), f"at most fleet.devices = {devices} kinds of devices")

    def _check_groups(self, method: Hierarchical) -> None:
        """There are as many devices as the fold needs updates of each group."""
        most = self.fleet.devices // self.task.fold.least
        if method.groups > most:
            allowed = f"at most {most} groups of fleet.devices = {self.fleet.devices}"
            raise ConfigError("task.method.groups", method.groups, allowed)

    def _check_conditions(self) -> None:
        """Limits, power and network mean something, and one section says when devices charge."""
        if isinstance(self.conditions, NoneSpec):
            for profile in self.profiles:
                self._check_unread(profile)
        if isinstance(self.conditions, DailySpec) and isinstance(self.availability, NightlySpec):
            allowed = "another kind with conditions, which say when devices charge"
            raise ConfigError("availability.kind", "nightly", allowed)

    def _check_unread(self, profile: Profile) -> None:
        """Nothing is said of a device that no conditions would read."""
        charges = isinstance(self.availability, NightlySpec)
        daily = "conditions.kind = 'daily'"
        for name, idle, read_with in (
            ("limits", profile.limits == Limits(), daily),
            ("power", profile.power == "mains" or charges, f"{daily} or availability.kind = 'nightly'"),
            ("network", profile.network == "home", daily),
        ):
            if not idle:
                field = f"profiles.{profile.name}.{name}"
                raise ConfigError(field, getattr(profile, name), f"given with {read_with} alone")

    def _check_bound(self) -> None:
        """Nothing is said of what a federation alone has."""
        if self.task.privacy is not None:
            raise ConfigError(
                "fleet.bound", self.fleet.bound, "none with [task.privacy], whose noise it has not"
            )
        if not 1 <= self.steps_alone <= _MOST_STEPS:
            allowed = f"such that there are 1 to {_MOST_STEPS} steps, not {self.steps_alone}"
            raise ConfigError("task.rounds.count", self.task.rounds.count, allowed)

    @property
    def steps_alone(self) -> int:
        """Of its bound."""
        return steps_alone(self.task, self.fleet.devices, self.fleet.bound)

    @property
    def shards(self) -> int:
        return self.data.shards or self.fleet.devices

    @property
    def least(self) -> int:
        """Rows that every device must get."""
        return self.data.partition.least or self.task.min_examples


def steps_alone(task: TaskSpec, devices: int, bound: str | None) -> int:
    """Of a bound: in one place as many as all devices take together, of one device its even share."""
    together = task.rounds.count * task.rounds.cohort * task.training.local_steps
    return together if bound == "centralised" else together // devices
