"""How long to wait after a failure: exponential with full jitter.

M. Brooker, "Exponential backoff and jitter", AWS Architecture Blog, 2015: uniform in 0..min(cap, base 2^n)
spreads a crowd of clients best.

A server that answers may still run a battery down: with work that it then refuses, or with waits of no time.
So work that came to nothing is counted by itself, which no answer mends, and short waits grow as they repeat.
"""

from __future__ import annotations

from fedtt.rng import Purpose, rng_for

__all__ = ["Backoff"]

_SHORT_S = 1.0  #: waits from this on are taken as the server asks for them
_SHORTEST_S = 0.001  #: the first of the others; doubles up to `_SHORT_S` from one to the next


class Backoff:
    """Counts the failures in a row of one device; each draw has an address, so runs can be repeated."""

    def __init__(self, *, device: int, seed: int = 0, first_s: float = 1.0, limit_s: float = 600.0) -> None:
        self._device, self._seed, self._first_s, self._limit_s = device, seed, first_s, limit_s
        self._failures = 0  #: to have an answer
        self._fruitless = 0  #: works that no receipt followed
        self._short = 0  #: waits that the server asked for
        self._draws = 0

    def failed(self, at_least_s: float = 0.0) -> float:
        """Seconds to wait after one more failure, counted from `at_least_s` where the server named a time."""
        self._failures += 1
        return at_least_s + self._drawn_s(self._failures)

    def fruitless(self) -> float:
        """Seconds to wait after work, done or begun, that brought no receipt."""
        self._fruitless += 1
        return self._drawn_s(self._fruitless)

    def asked(self, wait_s: float) -> float:
        """Seconds to wait where an answer asks for `wait_s`: longer, up to a second, the more it repeats."""
        self._failures = 0
        if wait_s >= _SHORT_S:
            return wait_s
        least_s = min(_SHORT_S, _SHORTEST_S * 2.0 ** min(self._short, 60))
        self._short += 1
        return max(wait_s, least_s)

    def succeeded(self) -> None:
        """A receipt came: begin anew with the shortest waits."""
        self._failures = self._fruitless = self._short = 0

    def _drawn_s(self, count: int) -> float:
        self._draws += 1
        rng = rng_for(self._seed, Purpose.BACKOFF, self._draws, self._device)
        return float(rng.uniform(0, min(self._limit_s, self._first_s * 2.0 ** min(count - 1, 60))))
