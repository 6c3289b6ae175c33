"""Experiments as files: which methods, on which data, dealt out how, with which seeds."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct

from fedtt.errors import ConfigError

__all__ = ["Arm", "Case", "Plan", "Set", "plans", "read_plan", "small"]

HERE = Path(__file__).parent
SEARCH_SEED = 100  #: of all searches; no reported run has it

Settings = dict[str, Any]


class _Part(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of all parts of a plan."""


class Set(_Part, frozen=True, kw_only=True):
    """One data set and what differs with it."""

    name: str  #: of its folder
    label: str = ""  #: where one set is used in several ways
    partitions: tuple[str, ...] = ()  #: on which it is run; none for all
    train_rows: int | None = None  #: a sample of so many training rows; None for all
    model: Settings = {}  #: of export, over the plan's
    fleet: Settings = {}
    task: Settings = {}

    @property
    def shown(self) -> str:
        return self.label or self.name


class Arm(_Part, frozen=True, kw_only=True):
    """One method with its adapter."""

    name: str  #: with {} in it one arm for each of the plan's variants, whose name stands there then
    partitions: tuple[str, ...] = ()  #: on which it is run; none for all
    rate_of: str = ""  #: the arm whose chosen rate it takes, of `rates_from` or here; none for its own
    bound: Literal["", "local only", "centralised"] = ""  #: no federation, but what it is measured against
    model: Settings = {}
    task: Settings = {}


class Plan(_Part, frozen=True, kw_only=True):
    """One experiment. Settings of a set, a partition and an arm lie over the plan's own, in this order."""

    number: int = 0  #: its place on the page, and in the queue
    title: str
    question: str
    reduced: str  #: what was made smaller than in the paper, and why
    verdict: str = ""  #: what came of it, in words, once results are there
    sets: Annotated[tuple[Set, ...], Meta(min_length=1)]
    arms: Annotated[tuple[Arm, ...], Meta(min_length=1)]
    variants: dict[str, Settings] = {}  #: name -> settings of the task, over those of an arm
    varied: tuple[str, ...] = ()  #: names of the arms with variants, as they stand in the file
    partitions: Annotated[dict[str, Settings], Meta(min_length=1)]
    rates: tuple[float, ...] = ()  #: learning rates every arm may choose from
    rates_from: str = ""  #: the experiment whose choices this one takes, set by set; it makes none then
    search_partition: str = ""
    search_rounds: int = 1
    search_s: float | None = None  #: virtual seconds of a search in place of its rounds, where time counts
    seeds: tuple[int, ...] = (0, 1, 2)
    judge_every: int = 5
    test_rows: int = 1000  #: judged at most, to choose by as well as to report
    by_time: bool = False  #: whether virtual seconds are what counts, not bytes
    target_below_points: float = 1.0  #: bytes are counted to the first arm's final accuracy less this
    model: Settings = {}
    fleet: Settings = {}
    task: Settings = {}
    profiles: list[Settings] = []

    def cases(self) -> Iterator[Case]:
        """Every run that is reported, seed by seed, so that an early end leaves whole comparisons."""
        for seed, set_, partition, arm in product(self.seeds, self.sets, self.partitions, self.arms):
            if all(partition in (part.partitions or self.partitions) for part in (set_, arm)):
                yield Case(plan=self, set=set_, partition=partition, arm=arm, seed=seed)

    def searches(self) -> Iterator[Case]:
        """Every run by which a learning rate is chosen: as many for each arm that takes no other's."""
        arms = [arm for arm in self.arms if not arm.rate_of]
        for set_, arm, rate in product(self.sets, arms, () if self.rates_from else self.rates):
            yield Case(
                plan=self, set=set_, partition=self.search_partition, arm=arm, seed=SEARCH_SEED, rate=rate
            )


class Case(_Part, frozen=True, kw_only=True):
    """One run."""

    plan: Plan
    set: Set
    partition: str
    arm: Arm
    seed: int
    rate: float | None = None  #: None for the one that was chosen

    @property
    def key(self) -> tuple[str, str, str, int, float | None]:
        return self.set.shown, self.partition, self.arm.name, self.seed, self.rate

    @property
    def digest(self) -> str:
        """Equal for runs that are the same whatever plan asks for them; the rate comes on top."""
        plan = self.plan
        parts = [
            self.set.name,
            self.set.train_rows,
            plan.test_rows,
            plan.partitions[self.partition],
            [self.settings(section) for section in ("model", "fleet", "task")],
            plan.profiles,
            self.seed,
            plan.search_rounds if self.is_cut else plan.judge_every,
            *filter(None, [self.arm.bound]),
        ]
        return hashlib.sha256(msgspec.json.encode(parts, order="deterministic")).hexdigest()[:16]

    @property
    def is_search(self) -> bool:
        return self.seed == SEARCH_SEED

    @property
    def is_cut(self) -> bool:
        """Whether it ends after `search_rounds`, and is judged then alone."""
        return self.is_search and self.plan.search_s is None

    def settings(self, section: str) -> Settings:
        """The settings of one section, the arm's over the set's over the plan's; a search's time over all."""
        merged: Settings = {}
        for part in (self.plan, self.set, self.arm):
            merged = _over(merged, getattr(part, section, {}))
        if section == "fleet" and self.is_search and not self.is_cut:
            merged["last_s"] = self.plan.search_s
        return merged


def _over(low: Settings, high: Settings) -> Settings:
    """`high` over `low`, section by section; a method takes the place of another whole."""
    found = dict(low)
    for key, value in high.items():
        merges = isinstance(value, dict) and isinstance(found.get(key), dict) and key != "method"
        found[key] = _over(found[key], value) if merges else value
    return found


def _varied(arm: Arm, plan: Plan) -> Iterator[Arm]:
    if "{}" not in arm.name:
        yield arm
        return
    for name, settings in plan.variants.items():
        yield msgspec.structs.replace(arm, name=arm.name.format(name), task=_over(arm.task, settings))


def small(plan: Plan) -> Plan:
    """The same plan with hardly any work: to see that all of it runs, not to compare anything."""
    arms = [msgspec.structs.replace(arm, task=_over(arm.task, _least(arm))) for arm in plan.arms]
    return msgspec.structs.replace(
        plan, arms=tuple(arms), rates=plan.rates[:1], seeds=plan.seeds[:1], test_rows=50, search_rounds=1
    )


def _least(arm: Arm) -> Settings:
    """One step a round, and as few rounds as a method has that measures devices in some of them."""
    warm_up = arm.task.get("method", {}).get("warmup_rounds", 1)
    return {"training": {"local_steps": 1}, "rounds": {"count": 1 + warm_up}}


def plans() -> dict[str, Path]:
    """name -> file of every experiment here, in their order."""
    found = sorted(HERE.glob("*.toml"), key=lambda path: (read_plan(path).number, path))
    return {path.stem: path for path in found}


def read_plan(path: Path) -> Plan:
    try:
        plan = msgspec.toml.decode(path.read_bytes(), type=Plan)
    except msgspec.DecodeError as error:
        raise ConfigError(path.name, "…", str(error)) from None
    plan = msgspec.structs.replace(
        plan,
        arms=tuple(v for arm in plan.arms for v in _varied(arm, plan)),
        varied=tuple(arm.name for arm in plan.arms if "{}" in arm.name),
    )
    if bool(plan.rates) == bool(plan.rates_from):
        raise ConfigError("rates", plan.rates, "given, or those of another experiment named as rates_from")
    if plan.rates and plan.search_partition not in plan.partitions:
        raise ConfigError("search_partition", plan.search_partition, "one of the plan's partitions")
    if plan.rates and plan.by_time and plan.search_s is None:
        raise ConfigError("search_s", None, "given, for arms compared by time have the same time to search")
    return plan
