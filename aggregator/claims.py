"""Which server sums a claimed round where several share a store: who claimed it, or another after a while."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from aggregator.lifecycle import Lifecycle
from fedtt.seams import Clock
from storage.records import Round
from storage.store import Store, Transaction

__all__ = ["TAKE_OVER_S", "Claims"]

TAKE_OVER_S = 3.0  #: for which the server that claimed a round is left alone with its sum
_LONGEST_PAUSE_S = 60.0  #: before a sum that failed is tried again

T = TypeVar("T")
_Key = tuple[int, str, int]


class Claims:
    """Sums are the same wherever they are computed and one alone is published: this spares doing them twice.

    That a round is claimed stands in the ledger, so a server that dies leaves nothing behind but its time.
    """

    def __init__(self, store: Store, lifecycle: Lifecycle, clock: Clock) -> None:
        self._is_shared, self._lifecycle, self._clock = store.is_shared, lifecycle, clock
        self._mine: set[_Key] = set()
        self._seen_at: dict[_Key, float] = {}
        self._failed: dict[_Key, tuple[float, float]] = {}  #: how long it pauses, and since when

    def noting(self, change: Callable[[Transaction], T]) -> Callable[[Transaction], tuple[T, set[_Key]]]:
        """The change, and the rounds that it claims; to be `noted` once it is durable."""

        def noting(tx: Transaction) -> tuple[T, set[_Key]]:
            before = self._claimed(tx)
            return change(tx), self._claimed(tx) - before

        return noting

    def _claimed(self, tx: Transaction) -> set[_Key]:
        return {_key(round_) for round_ in self._lifecycle.claimed(tx)} if self._is_shared else set()

    def noted(self, claimed: set[_Key]) -> None:
        self._mine |= claimed

    def failed(self, round_: Round) -> None:
        """Its sum met a mistake of ours: it pauses, each time for twice as long, and the updates stay."""
        pause_s, _ = self._failed.get(_key(round_), (0.5, 0.0))
        pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
        self._failed[_key(round_)] = pause_s, self._clock.now()

    def due(self, folding: list[Round]) -> list[Round]:
        """Of the rounds that wait for their sums, those to be summed here and now."""
        now, waiting = self._clock.now(), {_key(round_) for round_ in folding}
        self._failed = {key: pause for key, pause in self._failed.items() if key in waiting}
        if self._is_shared:
            self._mine &= waiting
            self._seen_at = {key: self._seen_at.get(key, now) for key in waiting}
        return [round_ for round_ in folding if self._is_due(_key(round_), now)]

    def _is_due(self, key: _Key, now: float) -> bool:
        pause_s, since = self._failed.get(key, (0.0, now))
        if 0 <= now - since < pause_s:  # a clock that was set back ends a pause
            return False
        return not self._is_shared or key in self._mine or now - self._seen_at[key] >= TAKE_OVER_S


def _key(round_: Round) -> _Key:
    return round_.task_id, round_.branch, round_.number
