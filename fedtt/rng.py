"""Randomness by address: the same (seed, purpose, round, device) gives the same stream anywhere.

The generator is Philox4x64-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011):
key = (seed, purpose), counter = (0, 0, round, device). Counters of 64 bits leave 2^128 draws to each
address before two streams could meet. Where one number is all that is drawn, BLAKE2b over the same address
gives it for a tenth of what a generator costs to make. Golden vectors: `tests/unit/fedtt/test_rng.py`.
"""

from __future__ import annotations

import struct
from enum import IntEnum
from hashlib import blake2b

import numpy as np

__all__ = ["Purpose", "rng_for", "uniform_at"]

_WORD = 2**64
_ADDRESS = struct.Struct("<4Q")


class Purpose(IntEnum):
    """What a stream is for, so that no two uses share their numbers."""

    INITIAL = 1  #: first values of the factors
    SAMPLING = 2  #: which devices a round invites
    BATCHES = 3  #: the order of a device's examples
    ROUNDING = 4  #: stochastic rounding in the codec
    BACKOFF = 5  #: jitter of retries
    PARTITION = 6  #: how an experiment deals a data set out to devices
    LEASES = 7  #: names of leases in an emulated fleet
    PROFILES = 8  #: which emulated device is of which kind
    ARRIVALS = 9  #: when an emulated device comes, and when it is there at all
    DROPOUT = 10  #: whether and when it vanishes in the middle of a training
    FAULTS = 11  #: what goes wrong on its way to the server
    LABEL_NOISE = 12  #: on what an emulated device tells of its labels
    JUDGED = 13  #: on which emulated devices a version is judged, and on which of their examples


def rng_for(seed: int, purpose: Purpose, round_number: int = 0, device: int = 0) -> np.random.Generator:
    """Return the stream at one address; each part is taken modulo 2^64."""
    key = np.array([seed % _WORD, int(purpose)], dtype=np.uint64)
    counter = np.array([0, 0, round_number % _WORD, device % _WORD], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter))


def uniform_at(seed: int, purpose: Purpose, round_number: int = 0, device: int = 0) -> float:
    """Return one number in [0, 1) at an address, a multiple of 2^-53; it is none of `rng_for`'s."""
    address = _ADDRESS.pack(seed % _WORD, purpose, round_number % _WORD, device % _WORD)
    return (int.from_bytes(blake2b(address, digest_size=8).digest(), "little") >> 11) * 2.0**-53
