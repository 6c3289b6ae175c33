"""What kinds of devices a fleet is made of, and how long the work of each takes."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta, Struct

from edge_client.conditions import Limits
from fedtt.errors import ConfigError
from fedtt.messages import Plan

__all__ = ["HEAD_BYTES", "Profile", "judging_s", "training_s"]

HEAD_BYTES = 640  #: of HTTP head and signature in one exchange; takes time on the link, is counted nowhere


class Profile(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One kind of device. The defaults are a phone of the middle class on a home network."""

    name: Annotated[str, Meta(min_length=1, max_length=40)] = "phone"
    share: float = 1.0  #: of the fleet, relative to the shares of the others
    step_s: float = 1.0  #: one local step over `reference_batch` rows, all adapted blocks trained
    reference_batch: int = 16
    speed_spread: float = 0.0  #: σ of the log-normal factor by which devices of this kind differ in `step_s`
    memory_mb: int = 0  #: training may use; 0 where the device does not say
    label_epsilon: float = 0.0  #: with which it tells counts of its labels to a task that asks; 0 tells none
    up_bps: float = 10e6  #: bits a second to the server
    down_bps: float = 50e6  #: and from it
    latency_s: float = 0.05  #: from a request's last bit to its answer's first
    dropout: float = 0.0  #: probability to vanish in the middle of a training, as in a crash
    power: Literal["mains", "battery"] = "mains"  #: on battery it may have nights in which it charges
    network: Literal["home", "metered"] = "home"  #: home: nobody counts its bytes while it is there
    limits: Limits = Limits()  #: what its owner asks for before it works, of what conditions say

    def __post_init__(self) -> None:
        for field in ("share", "step_s", "up_bps", "down_bps"):
            self._check(field, 0 < getattr(self, field) < float("inf"), "a number above 0")
        for field in ("latency_s", "speed_spread"):
            self._check(field, 0 <= getattr(self, field) < float("inf"), "a number from 0")
        self._check("reference_batch", self.reference_batch >= 1, "1 or more")
        self._check("memory_mb", self.memory_mb >= 0, "0 or more")
        self._check("label_epsilon", 0 <= self.label_epsilon <= 100, "a number from 0 to 100")
        hot = self.limits.max_temperature_c
        self._check("limits.max_temperature_c", hot is None, "left out: nothing here has a temperature", hot)
        self._check("dropout", 0 <= self.dropout < 1, "a probability from 0, below 1")

    def _check(self, field: str, sound: bool, allowed: str, value: object = None) -> None:
        if not sound:
            found = getattr(self, field) if value is None else value
            raise ConfigError(f"profiles.{self.name}.{field}", found, allowed)

    def up_s(self, size_bytes: int) -> float:
        """Seconds in which a body of this size leaves the device, its head with it."""
        return 8 * (size_bytes + HEAD_BYTES) / self.up_bps

    def down_s(self, size_bytes: int) -> float:
        return 8 * size_bytes / self.down_bps


def judging_s(profile: Profile, rows: int) -> float:
    """Seconds to judge two versions on so many examples: a pass forward is a third of a training step."""
    return 2 / 3 * profile.step_s * rows / profile.reference_batch


def training_s(profile: Profile, plan: Plan, share: float) -> float:
    """Seconds of one local training; `share` is the plan's `work_share`."""
    training = plan.training
    return training.local_steps * profile.step_s * share * training.batch_size / profile.reference_batch
