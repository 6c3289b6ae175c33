"""How long to wait after a failure: exponential with full jitter.

M. Brooker, "Exponential backoff and jitter", AWS Architecture Blog, 2015: uniform in 0..min(cap, base 2^n)
spreads a crowd of clients best.
"""

from __future__ import annotations

from fedtt.rng import Purpose, rng_for

__all__ = ["Backoff"]


class Backoff:
    """Counts the failures in a row of one device; each draw has an address, so runs can be repeated."""

    def __init__(self, *, device: int, seed: int = 0, first_s: float = 1.0, limit_s: float = 600.0) -> None:
        self._device, self._seed, self._first_s, self._limit_s = device, seed, first_s, limit_s
        self._failures = 0
        self._draws = 0

    def failed(self, at_least_s: float = 0.0) -> float:
        """Seconds to wait after one more failure, counted from `at_least_s` where the server named a time."""
        ceiling = min(self._limit_s, self._first_s * 2.0 ** min(self._failures, 60))
        self._failures += 1
        self._draws += 1
        rng = rng_for(self._seed, Purpose.BACKOFF, self._draws, self._device)
        return at_least_s + float(rng.uniform(0, ceiling))

    def succeeded(self) -> None:
        """Begin anew with the shortest wait."""
        self._failures = 0
