"""Dealing one data set out to many devices, as experiments do.

Every function gives row numbers for each device, every row to exactly one of them, the same for the same
seed. None leaves a device with fewer than `least` rows: what cannot be dealt so is a ConfigError.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from fedtt.errors import ConfigError
from fedtt.rng import Purpose, rng_for

__all__ = ["Shards", "by_user", "dirichlet", "few_labels", "iid", "lognormal", "zipf"]

Shards = list[list[int]]
_GREATEST_ALPHA = 1e9  #: far from where shares differ; much above it their sum is infinite
_LEAST_DRAWS, _MOST_DRAWS = 10, 1000
_MOST_SHARES = 10**8  #: drawn in all before a partition is refused, one a device and label: some seconds


def iid(rows: int, devices: int, seed: int, least: int = 1) -> Shards:
    """Shuffled, in parts whose sizes differ by at most one."""
    _check_rows(rows, devices, least)
    return _cut(rng_for(seed, Purpose.PARTITION).permutation(rows), np.full(devices, 1.0), least)


def dirichlet(labels: Sequence[int], devices: int, alpha: float, seed: int, least: int = 1) -> Shards:
    """Rows for each device with label skew: the share of each label over devices is drawn from Dir(α).

    T.-M. H. Hsu, H. Qi, M. Brown, arXiv 1909.06335. Draws again, from the same stream, until every device
    has at least `least` rows; where there are many devices and labels, less often. Raises ConfigError where
    that cannot be had.
    """
    _check_rows(len(labels), devices, least)
    if not 0 < alpha <= _GREATEST_ALPHA:
        raise ConfigError("alpha", alpha, f"a number above 0, at most {_GREATEST_ALPHA:g}")
    rng = rng_for(seed, Purpose.PARTITION)
    array = np.asarray(labels)
    of_label = [np.flatnonzero(array == label) for label in np.unique(array)]
    draws = min(_MOST_DRAWS, max(_LEAST_DRAWS, _MOST_SHARES // (devices * len(of_label))))
    for _ in range(draws):
        before = rng.bit_generator.state
        sizes = np.zeros(devices, np.int64)
        for rows in of_label:
            sizes += np.diff(_shared_out(rng, rows, devices, alpha)[1])
        if sizes.min() < least:
            continue
        rng.bit_generator.state = before  # the same once more: nobody keeps a share for each device and label
        shards: Shards = [[] for _ in range(devices)]
        for rows in of_label:
            shuffled, ends = _shared_out(rng, rows, devices, alpha)
            for shard, part in zip(shards, np.split(shuffled, ends[1:-1]), strict=True):
                shard.extend(part.tolist())
        return shards
    allowed = f"large enough that each of {devices} devices gets {least} rows, as in none of {draws} draws"
    raise ConfigError("alpha", alpha, allowed)


def _shared_out(
    rng: np.random.Generator, rows: NDArray[np.int64], devices: int, alpha: float
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The rows of a label, shuffled, and where each device's begin among them, (devices + 1,)."""
    shuffled = rng.permutation(rows)
    cuts = np.cumsum(rng.dirichlet(np.full(devices, alpha)))[:-1]
    return shuffled, np.concatenate([[0], (cuts * len(rows)).astype(np.int64), [len(rows)]])


def few_labels(labels: Sequence[int], devices: int, labels_each: int, seed: int, least: int = 1) -> Shards:
    """Each device holds rows of exactly `labels_each` labels; a label's rows go evenly to its holders.

    The pathological skew of McMahan et al. 2017 as "#C=k" of Q. Li et al. (ICDE 2022, arXiv 2102.02079).
    Labels go round in a drawn order, so that each has equally many holders, or one more.
    """
    _check_rows(len(labels), devices, least)
    array = np.asarray(labels)
    names = np.unique(array)
    if not 1 <= labels_each <= len(names):
        raise ConfigError("labels_each", labels_each, f"a number from 1 to the {len(names)} labels there are")
    if devices * labels_each < len(names):
        raise ConfigError(
            "labels_each",
            labels_each,
            f"at least {-(-len(names) // devices)}, so that {devices} devices hold all {len(names)} labels",
        )
    rng = rng_for(seed, Purpose.PARTITION)
    order, seats = rng.permutation(names), rng.permutation(devices)
    holders: dict[int, list[int]] = defaultdict(list)
    for turn, device in enumerate(np.repeat(seats, labels_each).tolist()):
        holders[int(order[turn % len(names)])].append(device)
    shards: Shards = [[] for _ in range(devices)]
    for label, held_by in sorted(holders.items()):
        rows = rng.permutation(np.flatnonzero(array == label))
        for device, part in zip(held_by, np.array_split(rows, len(held_by)), strict=True):
            shards[device].extend(part.tolist())
            if not len(part):
                raise ConfigError(
                    "labels_each",
                    labels_each,
                    f"fewer: label {label} has {len(rows)} rows for {len(held_by)}",
                )
    _check_least(shards, least, "labels_each", labels_each)
    return shards


def lognormal(rows: int, devices: int, sigma: float, seed: int, least: int = 1) -> Shards:
    """Quantity skew: sizes in proportion to exp(σ z), z normal; rows at random."""
    _check_rows(rows, devices, least)
    if not 0 <= sigma < 20:
        raise ConfigError("sigma", sigma, "a number from 0, below 20")
    rng = rng_for(seed, Purpose.PARTITION)
    return _cut(rng.permutation(rows), np.exp(sigma * rng.standard_normal(devices)), least)


def zipf(rows: int, devices: int, exponent: float, seed: int, least: int = 1) -> Shards:
    """Quantity skew: the size of the k-th largest is in proportion to 1 / k^s; rows at random."""
    _check_rows(rows, devices, least)
    if not 0 <= exponent < 20:
        raise ConfigError("exponent", exponent, "a number from 0, below 20")
    rng = rng_for(seed, Purpose.PARTITION)
    weights = np.arange(1, devices + 1, dtype=np.float64) ** -exponent
    return _cut(rng.permutation(rows), rng.permutation(weights), least)


def by_user(users: Sequence[str], devices: int, seed: int, least: int = 1) -> Shards:
    """One user's rows each: `devices` of the users who have `least` rows, drawn; the others take no part."""
    rows_of: dict[str, list[int]] = defaultdict(list)
    for row, user in enumerate(users):
        rows_of[user].append(row)
    able = sorted(user for user, rows in rows_of.items() if len(rows) >= least)
    if devices > len(able):
        raise ConfigError("devices", devices, f"at most {len(able)}, the users with at least {least} rows")
    chosen = sorted(rng_for(seed, Purpose.PARTITION).permutation(len(able))[:devices].tolist())
    return [rows_of[able[number]] for number in chosen]


def _cut(rows: NDArray[np.int64], weights: NDArray[np.float64], least: int) -> Shards:
    """Parts in proportion to the weights, after `least` for each; the largest remainders get what is left."""
    free = len(rows) - least * len(weights)
    exact = weights / weights.sum() * free
    counts = np.floor(exact).astype(np.int64)
    counts[np.argsort(counts - exact, kind="stable")[: free - int(counts.sum())]] += 1
    ends = np.cumsum(counts + least)[:-1]
    return [part.tolist() for part in np.split(rows, ends)]


def _check_rows(rows: int, devices: int, least: int) -> None:
    if devices < 1 or devices * least > rows:
        raise ConfigError("devices", devices, f"a number from 1 to {rows // max(1, least)} for {rows} rows")


def _check_least(shards: Shards, least: int, field: str, value: object) -> None:
    few = min(range(len(shards)), key=lambda device: len(shards[device]))
    if len(shards[few]) < least:
        raise ConfigError(
            field, value, f"such that each device gets {least} rows; device {few} gets {len(shards[few])}"
        )
