"""TaskSpec: one federated task, read from a TOML file that is refused where it makes no sense."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable
from typing import Annotated, Any, get_args

import msgspec
from msgspec import Meta, Struct

from fedtt.adapter import AdapterSpec
from fedtt.algorithms import FedTT, Method, Tier
from fedtt.budget import Budget
from fedtt.codec import CodecSpec, payload_bytes
from fedtt.errors import ConfigError
from fedtt.evaluation import EvaluationSpec
from fedtt.folds import Fold, Mean
from fedtt.layout import LiveSet
from fedtt.names import Slug
from fedtt.optimiser import TrainingSpec
from fedtt.privacy import PrivacySpec
from fedtt.sampling import ByExamples, PowerOfChoice, Sampling, Uniform
from fedtt.server_optimiser import ServerSpec, ServerState
from fedtt.wire import update_limit_bytes

__all__ = ["EvaluationSpec", "RoundSpec", "ServerSpec", "TaskSpec", "TrainingSpec", "parse_task", "read_task"]

_SIZE_LIMIT_BYTES = 64 * 1024
_DOTS_LIMIT = 100  #: tomllib's time grows with the square of a key's parts: 16 s for 20,000

Positive = Annotated[int, Meta(ge=1, le=10**9)]
Seconds = Annotated[float, Meta(gt=0, le=30 * 86400)]


class RoundSpec(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How devices are invited and when their updates are folded.

    At most `cohort` leases are given per version; a fold happens once `buffer` acceptable updates are in,
    or at the deadline with at least `quorum`. Over-selection is a cohort larger than the buffer.
    """

    count: Positive  #: folds after which the task is finished
    cohort: Positive  #: devices invited per version, K in McMahan et al. 2017
    buffer: Positive | None = None  #: updates that close a round at once; None for the whole cohort
    quorum: Positive = 1  #: fewest updates with which the deadline may close a round
    deadline_s: Seconds = 600.0  #: from the first lease of a round to its close
    lease_s: Seconds | None = None  #: how long a device may take; None for the deadline
    max_staleness: Annotated[int, Meta(ge=0, le=1000)] = 0  #: versions a base may be old; 0 = synchronous
    retry_s: Seconds = 30.0  #: after which a device without work asks again, jittered by half either way
    give_up_after: Positive = 5  #: abandoned rounds in a row after which the task pauses itself
    final_rate: Annotated[float, Meta(gt=0, le=1)] = (
        1.0  #: of training.learning_rate, what the last round has
    )

    def __post_init__(self) -> None:
        if self.closes_at > self.cohort:
            raise ConfigError(
                "rounds.buffer", self.buffer, f"a number from 1 to rounds.cohort = {self.cohort}"
            )
        if self.quorum > self.closes_at:
            raise ConfigError(
                "rounds.quorum", self.quorum, f"a number from 1 to rounds.buffer = {self.closes_at}"
            )
        if self.lease_s is not None and self.lease_s > self.deadline_s:
            raise ConfigError(
                "rounds.lease_s", self.lease_s, f"at most rounds.deadline_s = {self.deadline_s:g}"
            )

    @property
    def closes_at(self) -> int:
        """Updates that close a round before its deadline."""
        return self.cohort if self.buffer is None else self.buffer

    @property
    def most_updates(self) -> int:
        """That one round may hold: each lease of the versions that it still takes updates of."""
        return self.cohort * (1 + self.max_staleness)

    @property
    def lease_lasts_s(self) -> float:
        return self.deadline_s if self.lease_s is None else self.lease_s

    def rate_in(self, round_number: int) -> float:
        """What of the learning rate is left in a round: from 1 in the first it falls evenly to `final_rate`.

        Where devices differ, averaging reaches the optimum only as the rate falls: X. Li, K. Huang, W. Yang,
        S. Wang, Z. Zhang. "On the convergence of FedAvg on non-IID data". ICLR 2020, arXiv 1907.02189,
        Theorem 4. Abandoned rounds have numbers too, so there may be rounds past `count`.
        """
        done = min(1.0, (round_number - 1) / max(1, self.count - 1))
        return 1 + done * (self.final_rate - 1)


class TaskSpec(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the aggregator asks of a population."""

    name: Slug
    rounds: RoundSpec
    seed: Annotated[int, Meta(ge=0, le=2**53)] = 0
    training: TrainingSpec = TrainingSpec()
    method: Method = FedTT()
    fold: Fold = Mean()
    server: ServerSpec = ServerSpec()
    sampling: Sampling = Uniform()
    codec: CodecSpec = CodecSpec()
    budget: Budget = Budget()  #: the most a training may take of a device
    privacy: PrivacySpec | None = None  #: noise that devices add; None for none
    evaluation: EvaluationSpec | None = None  #: None where every version is released as it is folded
    min_examples: Positive = 1  #: a device with fewer usable examples is not invited
    priority: Annotated[int, Meta(ge=0, le=1000)] = 0  #: tasks with more are offered to devices first

    def __post_init__(self) -> None:
        name = _tag(self.method)
        if not (self.method.any_base or self.rounds.max_staleness == 0):
            raise ConfigError(
                "rounds.max_staleness",
                self.rounds.max_staleness,
                f"0 with {name}: its deltas mean something on their own base version alone",
            )
        if self.codec.error_feedback and not self.method.residual_lasts:
            raise ConfigError(
                "codec.error_feedback",
                True,
                f"false with {name} as it is set: its coordinates change, so a residual means nothing later",
            )
        if self.rounds.quorum < self.fold.least:
            raise ConfigError(
                "rounds.quorum", self.rounds.quorum, f"at least {self.fold.least}, which this fold needs"
            )
        if isinstance(self.sampling, PowerOfChoice) and self.sampling.candidates < self.rounds.cohort:
            raise ConfigError(
                "sampling.candidates",
                self.sampling.candidates,
                f"at least rounds.cohort = {self.rounds.cohort}",
            )
        if self.training.depth is not None and not self.method.any_depth:
            raise ConfigError("training.depth", self.training.depth, f"none with {name}, which sets its own")
        if self.privacy is not None:
            self._check_privacy()
        self.method.check_task(self)

    def _check_privacy(self) -> None:
        """Nothing else that comes from single examples may be asked for."""
        sound = "'uniform' or 'examples' with [privacy]: losses say more than the noise lets through"
        if not isinstance(self.sampling, Uniform | ByExamples):
            raise ConfigError("sampling.strategy", _tag(self.sampling), sound)
        if self.evaluation is not None and self.evaluation.by == "devices":
            raise ConfigError("evaluation.by", "devices", "'file' with [privacy], for the same reason")
        if not self.method.any_depth:
            raise ConfigError("method.name", _tag(self.method), "none that goes by losses with [privacy]")

    def live(self, adapter: AdapterSpec, round_number: int, state: ServerState | None = None) -> LiveSet:
        """What the method trains in a round, of the blocks that `training.depth` leaves."""
        live = self.method.live(adapter, round_number, state)
        return live if self.training.depth is None else adapter.live_at(self.training.depth, live)

    def training_in(self, round_number: int) -> TrainingSpec:
        """What devices do in a round."""
        rate = self.training.learning_rate * self.rounds.rate_in(round_number)
        return msgspec.structs.replace(self.training, learning_rate=rate)

    def check(self, adapter: AdapterSpec) -> None:
        """Raise ConfigError where the task cannot train these adapters."""
        self.method.check(adapter)
        self.fold.check(self.rounds.most_updates, self.method.space(adapter, adapter.layout.everything).size)
        depth = self.training.depth
        if depth is not None and depth > adapter.depth:
            raise ConfigError(
                "training.depth", depth, f"at most {adapter.depth}, the bundle's adapted blocks"
            )
        limit, live = self.budget.upload_bytes, self.live(adapter, 1)
        if limit is not None and (least := update_limit_bytes(payload_bytes(self.codec, live))) > limit:
            raise ConfigError(
                "budget.upload_bytes", limit, f"at least {least}, for a frame of the first round"
            )


def _tag(value: Struct) -> str:
    return str(value.__struct_config__.tag)


def parse_task(text: str, where: str = "task") -> TaskSpec:
    """Read a task file; raises ConfigError with the field, its value and what is allowed."""
    if len(text.encode()) > _SIZE_LIMIT_BYTES:
        raise ConfigError(where, f"{len(text)} characters", f"at most {_SIZE_LIMIT_BYTES} bytes")
    if any(line.count(".") > _DOTS_LIMIT for line in text.splitlines() if line.lstrip()[:1] != "#"):
        raise ConfigError(where, "…", f"at most {_DOTS_LIMIT} dots in a line")
    try:
        raw = tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # also a number of more digits than Python reads
        raise ConfigError(where, "…", f"valid TOML ({error})") from None
    return read_task(raw, where)


def read_task(raw: dict[str, Any], where: str = "task") -> TaskSpec:
    """The same for what a TOML file holds."""
    try:
        return msgspec.convert(raw, TaskSpec, strict=True)
    except msgspec.ValidationError as error:
        raise _explain(error, raw, where) from None
    except ConfigError as error:
        raise ConfigError(error.field, error.value, error.allowed, where) from None


_AT = re.compile(r" - at `\$\.?(?P<path>[^`]*)`$")
_NAMED = re.compile(r"(?P<what>unknown|required) field `(?P<name>[^`]+)`")
_SECTIONS: dict[str, type[Struct]] = {
    "": TaskSpec,
    "rounds": RoundSpec,
    "training": TrainingSpec,
    "server": ServerSpec,
    "codec": CodecSpec,
    "budget": Budget,
    "privacy": PrivacySpec,
    "evaluation": EvaluationSpec,
    "method.tiers[]": Tier,
}
_CHOICES: dict[str, tuple[str, Any]] = {
    "method": ("name", Method),
    "fold": ("kind", Fold),
    "sampling": ("strategy", Sampling),
}


def _explain(error: msgspec.ValidationError, raw: dict[str, Any], where: str) -> ConfigError:
    """Turn msgspec's message and path into a field, the value found there and what is allowed."""
    message = str(error)
    at = _AT.search(message)
    path = at["path"] if at else ""
    allowed = _AT.sub("", message)
    if named := _NAMED.search(message):
        path = f"{path}.{named['name']}".lstrip(".")
        known = ", ".join(_types_beside(path, raw)) or "nothing"
        allowed = f"known settings here are {known}" if named["what"] == "unknown" else "it must be given"
    elif path in {f"{section}.{field}" for section, (field, _) in _CHOICES.items()}:
        allowed = _one_of(_kinds(path.partition(".")[0]))
    elif allowed.startswith("Invalid enum value"):
        allowed = _one_of(get_args(_types_beside(path, raw)[path.rpartition(".")[2]]))
    return ConfigError(path or "task", _lookup(raw, path), allowed, where)


def _lookup(raw: Any, path: str) -> object:
    """What stands at a path such as `method.tiers[0].rank`; None where nothing does."""
    for part in re.findall(r"[^.\[\]]+", path):
        if isinstance(raw, list) and part.isdecimal() and int(part) < len(raw):
            raw = raw[int(part)]
        else:
            raw = raw.get(part) if isinstance(raw, dict) else None
    return raw


def _one_of(values: Iterable[str]) -> str:
    return "one of " + ", ".join(sorted(repr(value) for value in values))


def _kinds(section: str) -> dict[str, type[Struct]]:
    """The values a section's tag may have, with their types."""
    return {str(kind.__struct_config__.tag): kind for kind in get_args(_CHOICES[section][1])}


def _types_beside(path: str, raw: dict[str, Any]) -> dict[str, Any]:
    """The settings that may stand where `path` points, with their types."""
    name = re.sub(r"\[\d+\]", "[]", path.rpartition(".")[0])
    section = _SECTIONS.get(name)
    if name in _CHOICES:
        section = _kinds(name).get(str(_lookup(raw, f"{name}.{_CHOICES[name][0]}")))
    return {field.encode_name: field.type for field in msgspec.structs.fields(section)} if section else {}
