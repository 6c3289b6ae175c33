"""When a device whose check-in found no room is to ask again: as those that were answered lately."""

from __future__ import annotations

from aggregator import rules
from aggregator.coordinator import IDLE_RETRY_S

__all__ = ["Pace"]

_WEIGHT = 1 / 64  #: of the newest answer in the mean
_LONGEST_S = 600.0  #: that counts of one: whose turn is far is told an hour, and the refused may be invited


class Pace:
    """The mean wait that devices were told, spread as theirs are.

    A crowd fills the queue and half of it is refused: told to return at once, that half is the next crowd.
    """

    def __init__(self) -> None:
        self._mean_s = IDLE_RETRY_S  #: until somebody was told

    def told(self, wait_s: float) -> None:
        """Note what a device that had to wait was told."""
        self._mean_s += _WEIGHT * (min(wait_s, _LONGEST_S) - self._mean_s)

    def again_s(self, now: float, device_id: str) -> float:
        """Between half and one and a half of the mean."""
        return rules.idle_retry_s(self._mean_s, now, device_id)
