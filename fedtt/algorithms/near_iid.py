"""Near-IID groups of devices that are about equally fast.

J. Liu, Y. Liao, H. Xu, Y. Xu. "Resource-efficient federated fine-tuning large language models for
heterogeneous data". 2025, arXiv 2503.21213 (HierFedLoRA): devices are put together so that each group has
about the labels of the whole population. The greedy rule is ours.

With s_gc the examples of label c in group g, p_c the label's share of all examples and u_gc = s_gc G / s_c
how much of its fair share the group has, a partition costs
Σ_g (n/G) Σ_c p_c (u_gc - 1)² + λ Σ_i (x_i - c_g(i))².
The first part is χ² of the groups' labels against the population's (which Kullback-Leibler and Jensen-Shannon
divergence follow where they are small); unlike those it says of a group that is not yet full what it lacks.
In the second x_i is the standardised log of device i's time and c_g the mean of the g-th of equal parts of
all times: so group 0 is for the fastest devices, and within a group none waits long for another.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

__all__ = ["Member", "divergence", "near_iid", "place"]

Vector = NDArray[np.float64]

_WEIGHED = 1000.0  #: examples up to which a device's counts count, so that none can bend its group's labels


class Member(Struct, frozen=True, kw_only=True):
    """What is known of a device that belongs to a group."""

    labels: NDArray[np.int64] | None = None  #: noisy counts (C,), where it has told them
    time_s: float | None = None  #: of one participation at full depth, where one was measured


def divergence(counts: Vector, population: Vector) -> Vector:
    """Jensen-Shannon divergence in bits of each row of counts (…, C) from the population's (C,): (…,).

    Counts below zero are noise and count as zero; a row without any diverges fully.
    """
    p, q = np.maximum(counts, 0.0), np.maximum(population, 0.0)
    total = p.sum(axis=-1, keepdims=True)
    p = np.divide(p, total, out=np.zeros_like(p), where=total > 0)
    q = q / max(float(q.sum()), np.finfo(float).tiny)
    found = _entropy((p + q) / 2) - (_entropy(p) + _entropy(q)) / 2
    return np.asarray(np.where(total[..., 0] > 0, np.clip(found, 0.0, 1.0), 1.0))


def _entropy(p: Vector) -> Vector:
    logs = np.log2(p, out=np.zeros_like(p), where=p > 0)
    return np.asarray(-(p * logs).sum(axis=-1))


def near_iid(members: Sequence[Member], groups: int, time_weight: float) -> list[int]:
    """The group of each member, from 0; the same members in the same order give the same groups.

    Greedy: the devices that weigh most come first, and each joins the group that still has room and where the
    cost rises least. Sizes differ by one at most, so that
    no group is empty where there are members enough.
    """
    forming = _Forming(members, groups, time_weight)
    assigned = [0] * len(members)
    for index in forming.order:
        assigned[index] = forming.join(index)
    return assigned


def place(
    newcomers: Sequence[Member],
    members: Sequence[Member],
    groups: Sequence[int],
    count: int,
    time_weight: float,
) -> list[int]:
    """Which of `count` groups each newcomer joins, by the rule of `near_iid`; `groups` are the members'."""
    forming = _Forming([*members, *newcomers], count, time_weight)
    for index, group in enumerate(groups):
        forming.put(index, group)
    joined = {index: forming.join(index) for index in forming.order if index >= len(members)}
    return [joined[index] for index in sorted(joined)]


class _Forming:
    """Groups while devices join them."""

    def __init__(self, members: Sequence[Member], groups: int, time_weight: float) -> None:
        self._shares, self._importance = _fair_shares(members, groups)
        self._times = _standardised(members)
        self._centres = _centres(self._times, groups)
        self._weight = time_weight
        self._least, self._more = divmod(len(members), groups)
        self._sizes = np.zeros(groups, np.int64)
        self._has = np.zeros((groups, len(self._importance)))  #: u, (G, C)

    @property
    def order(self) -> list[int]:
        """Those that have much of few labels first; the slower first among those that have told none."""
        large = (self._importance * self._shares**2).sum(axis=1)
        slow = np.nan_to_num(self._times, nan=-np.inf)
        return sorted(range(len(large)), key=lambda i: (-large[i], -slow[i], i))

    def join(self, index: int) -> int:
        """Put a member where it costs least; of equal groups into the smallest, and of those the first."""
        share = self._shares[index]
        rise = (self._importance * share * (share + 2 * (self._has - 1))).sum(axis=1)
        if not np.isnan(self._times[index]):
            rise += self._weight * (self._times[index] - self._centres) ** 2
        best = min(self._free(), key=lambda g: (round(float(rise[g]), 12), self._sizes[g], g))
        self.put(index, best)
        return best

    def _free(self) -> list[int]:
        """Groups with room: n mod G of them take one device more than the others."""
        larger = int((self._sizes > self._least).sum())
        free = (self._sizes < self._least) | ((self._sizes == self._least) & (larger < self._more))
        found: list[int] = np.flatnonzero(free if free.any() else self._sizes == self._sizes.min()).tolist()
        return found

    def put(self, index: int, group: int) -> None:
        self._sizes[group] += 1
        self._has[group] += self._shares[index]


def _fair_shares(members: Sequence[Member], groups: int) -> tuple[Vector, Vector]:
    """What each device adds to a group's fair share of each label, (n, C), and (n/G) p_c, (C,).

    Labels of which noise leaves no example count nothing.
    """
    told = {i: _bounded(m.labels) for i, m in enumerate(members) if m.labels is not None}
    counts = np.zeros((len(members), len(next(iter(told.values()))) if told else 0))
    for index, of_one in told.items():
        counts[index] = of_one
    total = np.maximum(counts.sum(axis=0), 0.0)
    shares = np.divide(groups * counts, total, out=np.zeros_like(counts), where=total > 0)
    importance = len(members) / groups * total / max(float(total.sum()), np.finfo(float).tiny)
    return shares, importance


def _bounded(counts: NDArray[np.int64]) -> Vector:
    told = float(np.maximum(counts, 0).sum())
    return counts.astype(np.float64) * min(1.0, _WEIGHED / max(told, 1.0))


def _standardised(members: Sequence[Member]) -> Vector:
    """log time less its mean, over its standard deviation, (n,); NaN where none was measured."""
    logs: Vector = np.array([np.nan if m.time_s is None else np.log(max(m.time_s, 1e-3)) for m in members])
    known = logs[~np.isnan(logs)]
    if not len(known):
        return logs
    spread = float(known.std())
    found: Vector = (logs - known.mean()) / (spread if spread > 1e-9 else 1.0)
    return found


def _centres(times: Vector, groups: int) -> Vector:
    """The mean of each of `groups` equal parts of the known times in their order, (G,)."""
    known = np.sort(times[~np.isnan(times)])
    if len(known) < groups:
        return np.zeros(groups)
    return np.array([part.mean() for part in np.array_split(known, groups)])
