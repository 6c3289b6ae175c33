"""Dealing one data set out to many devices, as experiments do."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fedtt.errors import ConfigError
from fedtt.rng import Purpose, rng_for

__all__ = ["dirichlet"]


def dirichlet(
    labels: Sequence[int], devices: int, alpha: float, seed: int, least: int = 1
) -> list[list[int]]:
    """Rows for each device with label skew: the share of each label over devices is drawn from Dir(α).

    T.-M. H. Hsu, H. Qi, M. Brown, arXiv 1909.06335. Draws again, from the same stream, until every device
    has at least `least` rows. Raises ConfigError where that cannot be had.
    """
    if devices * least > len(labels):
        raise ConfigError("devices", devices, f"at most {len(labels) // least} for {len(labels)} rows")
    if alpha <= 0:
        raise ConfigError("alpha", alpha, "a number above 0")
    rng = rng_for(seed, Purpose.PARTITION)
    array = np.asarray(labels)
    for _ in range(1000):
        shards: list[list[int]] = [[] for _ in range(devices)]
        for label in np.unique(array):
            rows = rng.permutation(np.flatnonzero(array == label))
            cuts = np.cumsum(rng.dirichlet(np.full(devices, alpha)))[:-1]
            for shard, part in zip(shards, np.split(rows, (cuts * len(rows)).astype(int)), strict=True):
                shard.extend(part.tolist())
        if min(map(len, shards)) >= least:
            return shards
    raise ConfigError("alpha", alpha, f"large enough that each of {devices} devices gets {least} rows")
