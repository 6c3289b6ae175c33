"""Who is in a fleet: a few numbers for each device, and the state of those that have one.

A device costs its row of the arrays below (about 45 bytes) and, once it has enrolled, what its journal says
(about 0.6 kB, beside what the server's store keeps of it);
everything else exists only while the device is awake.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from edge_client.journal import State
from fedtt.errors import ConfigError
from fedtt.rng import Purpose, rng_for
from fleet.profiles import Profile

__all__ = ["Population", "StatePlace", "device_key"]

_NEVER = float("inf")
_NEW = State()  #: of every device's first journal, so that all share its empty dicts


def device_key(seed: int, index: int) -> bytes:
    """32 bytes that are the same in every run: an Ed25519 private key, or in process the name-giving key."""
    return hashlib.sha256(b"fedtt fleet device %d of %d" % (index, seed)).digest()


class Population:
    """`size` devices of the given kinds, each with one of `shards` shards of data.

    Kinds are dealt in proportion to their shares, each an exact count, in an order drawn from the seed.
    """

    def __init__(self, *, size: int, shards: int, profiles: Sequence[Profile], seed: int) -> None:
        self.size, self.profiles, self.seed = size, tuple(profiles), seed
        self.profile = _dealt([profile.share for profile in profiles], size, seed)  #: index into `profiles`
        self.shard = (np.arange(size) % shards).astype(np.int32)
        self._begin()

    def anew(self) -> Population:
        """The same devices before they first come: of another run, that shares only who they are."""
        other = copy.copy(self)
        other._begin()
        return other

    def _begin(self) -> None:
        size = self.size
        self.next_at = np.zeros(size)  #: when it comes next, Unix seconds; inf while it is awake or has left
        self.sent_bytes = np.zeros(size, np.int64)
        self.received_bytes = np.zeros(size, np.int64)  #: without bundles
        self.participations = np.zeros(size, np.int32)  #: acknowledged updates
        self.failures = np.zeros(size, np.int8)  #: leases given back since its last training
        self.exchanges = np.zeros(size, np.int32)  #: with the server, counted where faults are drawn for them
        self.has_bundle = np.zeros(size, np.bool_)
        self.left_out = np.zeros(size, np.bool_)
        self._states: dict[int, State] = {}  #: immutable: what two have in common is there once

    def speed_factor(self, index: int) -> float:
        """By which this device is slower than its kind; log-normal with median 1."""
        spread = self.profiles[self.profile[index]].speed_spread
        if not spread:
            return 1.0
        return float(np.exp(spread * rng_for(self.seed, Purpose.PROFILES, 1, index).standard_normal()))

    def state(self, index: int) -> State:
        """What a device's journal said last, or a new one's says."""
        return self._states.get(index, _NEW)

    def keep(self, index: int, state: State) -> None:
        """Keep what a device's journal says until it comes again."""
        if state.device:
            self._states[index] = state

    def leave_out(self, index: int) -> None:
        """It comes no more."""
        self.left_out[index], self.next_at[index] = True, _NEVER
        self._states.pop(index, None)


class StatePlace:
    """A journal's place in memory, while its device is awake."""

    def __init__(self, state: State) -> None:
        self._state = state

    def read(self) -> State:
        return self._state

    def write(self, state: State) -> None:
        self._state = state


def _dealt(shares: Sequence[float], size: int, seed: int) -> NDArray[np.uint16]:
    """The kind of each device: the largest remainder gives each kind its count, a shuffle its members."""
    exact = np.asarray(shares) / sum(shares) * size
    counts = np.floor(exact).astype(np.int64)
    counts[np.argsort(counts - exact, kind="stable")[: size - int(counts.sum())]] += 1
    if (counts == 0).any():
        kind = int(np.flatnonzero(counts == 0)[0])
        raise ConfigError(
            "profiles.share", shares[kind], f"large enough that one of {size} devices is of this kind"
        )
    kinds = np.repeat(np.arange(len(shares), dtype=np.uint16), counts)
    return rng_for(seed, Purpose.PROFILES).permutation(kinds)
