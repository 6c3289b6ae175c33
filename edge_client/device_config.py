"""What the owner or the app of a device decides."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

from edge_client.conditions import Limits
from fedtt.budget import Budget
from fedtt.errors import ConfigError

__all__ = ["DeviceConfig"]


@dataclass(frozen=True, kw_only=True)
class DeviceConfig:
    """What the owner or the app decides."""

    token: str = ""  #: for enrolment; not needed once enrolled
    client: str = "fedtt-edge"  #: program and version, shown to whoever runs the server
    memory_mb: int = 0  #: training may use; 0 leaves the choice of a rank to the task
    max_training_s: float | None = None  #: longest training, or judging; None for as long as it is of use
    max_download_mb: int | None = None  #: most that a task may load before it trains; None for any number
    judges: bool = True  #: whether versions may be judged on this device's examples
    activation_limit_mb: int = 256  #: of disk, for what frozen blocks give of each example; 0 keeps nothing
    limits: Limits = field(default_factory=Limits)  #: battery, network and the like while it may work
    rest_s: float = 60.0  #: before it looks again whether they hold
    watch_s: float = 5.0  #: how often it looks while it works
    label_epsilon: float = 0.0  #: largest ε with which counts of labels may be told; 0 tells none
    seed: int = 0  #: of the jitter of retries
    retry_first_s: float = 1.0  #: ceiling of the first wait after a failure; doubles from there
    retry_limit_s: float = 600.0  #: and never exceeds this
    max_attempts: int = 3  #: at one lease that may end in a crash before it is given back

    def __post_init__(self) -> None:
        if not 0 < self.retry_first_s <= self.retry_limit_s:
            raise ConfigError("retry_first_s", self.retry_first_s, f"above 0, at most {self.retry_limit_s:g}")
        for name in ("rest_s", "watch_s"):
            if not 0 < (value := getattr(self, name)) <= 86400:
                raise ConfigError(name, value, "a number of seconds above 0, at most 86400")
        for name in ("memory_mb", "activation_limit_mb"):
            if not 0 <= (value := getattr(self, name)) <= 10**9:
                raise ConfigError(name, value, "a whole number from 0 to 1000000000")
        if self.max_training_s is not None and not 0 < self.max_training_s <= 30 * 86400:
            raise ConfigError("max_training_s", self.max_training_s, "above 0, at most 2592000")
        if self.max_download_mb is not None and not 1 <= self.max_download_mb <= 2**30:
            raise ConfigError("max_download_mb", self.max_download_mb, "a whole number from 1 to 1073741824")
        if not 0 <= self.label_epsilon <= 100:
            raise ConfigError("label_epsilon", self.label_epsilon, "a number from 0 to 100")
        if self.max_attempts < 1:
            raise ConfigError("max_attempts", self.max_attempts, "1 or more")

    @cached_property
    def budget(self) -> Budget:
        """Most that any task's training may take here."""
        mb = self.max_download_mb
        return Budget(
            memory_mb=self.memory_mb or None,
            time_s=self.max_training_s,
            download_bytes=None if mb is None else mb << 20,
        )
