"""How often a group folds by itself and how deep it trains: τ and d of every group, chosen together.

J. Liu, Y. Liao, H. Xu, Y. Xu. "Resource-efficient federated fine-tuning large language models for
heterogeneous data". 2025, arXiv 2503.21213 (HierFedLoRA) couples the two: deeper training takes longer, so
fewer rounds fit between two global folds. The model by which we choose is our own:

- a round of group g at depth d lasts s_g (1 + 2 d/D) / 3 seconds, s_g measured;
- τ rounds at depth d lower the loss by a_g (d/D)^ρ h(τ) with h(τ) = 1 + q + ... + q^(τ-1). a_g and ρ are
  measured; q is how far the groups' changes agreed when they were last put together: what a group learned
  apart counts as far as others learned it too;
- it sends n_g τ b(d) bytes.

Of all (τ_g, d_g) of all groups the choice has the largest Σ_g drop / (T^(1-β) · bytes^β), where T is how
long the slowest of them takes: for β = 0 the drop per second, for β = 1 per byte. A slow group then trains
shallower or folds less often, and all are done at about the same time.

The search is exact and no product. Within a period T let (B, D) be the bytes and the drop of all groups
together. {D ≤ c B^β} is convex for 0 ≤ β ≤ 1, so over the convex hull of all (B, D) the ratio D / B^β is
largest in a vertex; as it grows with D and falls with B, in one that maximises D - λ B for some λ ≥ 0. There
each group maximises its own a_g drop - λ n_g bytes. As λ falls, the groups walk along the hulls of their own
choices, that one first whose next step brings most a byte. Every sum on that walk is looked at, for each T at
which a group can end. Where these are more than some thousands (many groups, frequencies and blocks), only
the last T in each step of one ratio is, which loses less than that ratio: all that ends by an earlier one
ends by it, too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from fedtt.work import depth_share

__all__ = [
    "PRIOR_AGREEMENT",
    "PRIOR_EXPONENT",
    "Bounds",
    "Pace",
    "Progress",
    "choose_paces",
    "fitted_exponent",
    "rounds_worth",
    "upper_left",
]

PRIOR_EXPONENT = 0.5  #: ρ before anything was measured: half the depth gives seven tenths of the drop
PRIOR_AGREEMENT = 0.5  #: q before groups were put together for the first time
_EXPONENTS = (0.1, 2.0)
_RIDGE = 0.5  #: weight of the earlier ρ against what one period shows
_WORTH_CHANGING = 1.1  #: by which another choice must beat the one in force
_LEAST_DROP = 1e-6
_PERIODS = 4096  #: of which more are thinned
_MOST_AGREEMENT = 0.99

Values = NDArray[np.float64]


class Pace(Struct, frozen=True, kw_only=True):
    """What one group does between two global folds."""

    frequency: int  #: τ, rounds of its own
    depth: int  #: d, adapted blocks that are trained, from the last


class Bounds(Struct, frozen=True, kw_only=True):
    """What may be chosen, and by what."""

    max_frequency: int
    min_depth: int
    payload_bytes: tuple[int, ...]  #: b(d) of one update, for d = 1 ... D
    bytes_weight: float  #: β

    @property
    def deepest(self) -> int:
        """D, the adapted blocks."""
        return len(self.payload_bytes)


class Progress(Struct, frozen=True, kw_only=True):
    """What a group has shown."""

    round_s: float  #: s_g: one round at full depth
    cohort: int  #: n_g: updates a round
    pace: Pace | None = None  #: by which it did; None for a new group
    loss_drop: float | None = None  #: in the period that has ended; None where nothing was folded


def rounds_worth(frequency: int, agreement: float) -> float:
    """h(τ): how many rounds' worth of progress is left of τ rounds apart."""
    q = min(max(agreement, 0.0), _MOST_AGREEMENT)
    return (1 - q**frequency) / (1 - q)


def fitted_exponent(
    groups: Sequence[Progress], deepest: int, agreement: float, earlier: float = PRIOR_EXPONENT
) -> float:
    """ρ from how much more the deeper groups' loss fell: groups are near-IID, so only depth sets them apart.

    The slope of log(drop / h(τ)) over log(d/D), by least squares with the earlier ρ as a prior.
    """
    seen = [(g.pace, g.loss_drop) for g in groups if g.pace and g.loss_drop and g.loss_drop > 0]
    if not seen:
        return earlier
    x = np.log([pace.depth / deepest for pace, _ in seen])
    y = np.log([drop / rounds_worth(pace.frequency, agreement) for pace, drop in seen])
    x, y = x - x.mean(), y - y.mean()
    slope = float((x @ y + _RIDGE * earlier) / (x @ x + _RIDGE))
    return min(max(slope, _EXPONENTS[0]), _EXPONENTS[1])


def choose_paces(
    groups: Sequence[Progress],
    bounds: Bounds,
    agreement: float = PRIOR_AGREEMENT,
    exponent: float = PRIOR_EXPONENT,
) -> tuple[Pace, ...]:
    """(τ_g, d_g) of every group; those in force stay unless others promise a tenth more."""
    model = _Model(groups, bounds, agreement, exponent)
    best = max((model.within(period_s) for period_s in model.periods()), key=model.score)
    held = [group.pace for group in groups]
    now = tuple(pace for pace in held if pace is not None)
    if len(now) == len(held) and all(model.allows(pace) for pace in now):
        return now if model.score(best) < _WORTH_CHANGING * model.score(now) else best
    return best


def upper_left(x: Values, y: Values) -> list[int]:
    """The vertices of the convex hull of points x, y (n,) in which y - λ x is largest for some λ ≥ 0, by x.

    Of points at one place the first. A. M. Andrew, "Another efficient algorithm for convex hulls in two
    dimensions". Information Processing Letters 9(5), 1979.
    """
    found: list[int] = []
    for i in np.lexsort((-y, x)).tolist():
        if found and y[i] <= y[found[-1]]:
            continue
        while len(found) > 1 and _is_below(x, y, found[-2], found[-1], i):
            found.pop()
        found.append(i)
    return found


def _is_below(x: Values, y: Values, first: int, middle: int, last: int) -> bool:
    """Whether the middle of three points from the left is on or under the line through the others."""
    rise, run = y[middle] - y[first], x[middle] - x[first]
    return bool(rise * (x[last] - x[middle]) <= run * (y[last] - y[middle]))


class _Model:
    """What each choice would bring by the measurements so far."""

    def __init__(self, groups: Sequence[Progress], bounds: Bounds, agreement: float, exponent: float) -> None:
        self._groups, self._bounds = groups, bounds
        depths = np.arange(bounds.min_depth, bounds.deepest + 1)
        frequencies = np.arange(1, bounds.max_frequency + 1)
        self._gain = (depths / bounds.deepest) ** exponent
        self._worth = np.array([rounds_worth(int(f), agreement) for f in frequencies])
        self._share = np.array([depth_share(int(d), bounds.deepest) for d in depths])
        sizes = np.array(bounds.payload_bytes[bounds.min_depth - 1 :], np.float64)
        self._bytes = frequencies[:, None] * sizes  #: of one device, (τ_max, depths)
        self._rounds = frequencies[:, None] * self._share  #: lasts so many full rounds, likewise
        self._drop = self._worth[:, None] * self._gain  #: likewise, over a_g
        self._scale = [self._measured(group) for group in groups]  #: a_g
        self._shortest = np.argsort(self._rounds, axis=None, kind="stable")
        self._lengths = self._rounds.flat[self._shortest]
        self._hulls: dict[int, list[int]] = {}  #: by how many of the shortest choices fit

    def _measured(self, group: Progress) -> float:
        if group.pace is None or group.loss_drop is None or not self.allows(group.pace):
            return 1.0 if group.loss_drop is None and group.pace is None else _LEAST_DROP
        return max(group.loss_drop, _LEAST_DROP) / self._at(self._drop, group.pace)

    def allows(self, pace: Pace) -> bool:
        b = self._bounds
        return 1 <= pace.frequency <= b.max_frequency and b.min_depth <= pace.depth <= b.deepest

    def _at(self, table: Values, pace: Pace) -> float:
        return float(table[pace.frequency - 1, pace.depth - self._bounds.min_depth])

    def periods(self) -> list[float]:
        """T at which some group is just done, from the first in which each fits one round.

        Every one, or the last in each of `_PERIODS` steps of an equal ratio: with last / first = 1000, 0.2 %.
        """
        least = max(group.round_s for group in self._groups) * float(self._share[0])
        ends = {float(group.round_s * rounds) for group in self._groups for rounds in self._rounds.flat}
        found = np.array(sorted(end for end in ends if end >= least))
        if len(found) > _PERIODS:
            steps = np.floor(_PERIODS * np.log(found / found[0]) / math.log(found[-1] / found[0]))
            found = found[np.diff(steps, append=np.inf) > 0]
        return [float(end) for end in found]

    def within(self, period_s: float) -> tuple[Pace, ...]:
        """The paces of most Σ drop / bytes^β that end in time, of all that do."""
        hulls, drops, sent = [], [], []
        for group, scale in zip(self._groups, self._scale, strict=True):
            hull = self._hull(period_s * (1 + 1e-9) / group.round_s)
            hulls.append(hull)
            drops.append(scale * self._drop.flat[hull])
            sent.append(group.cohort * self._bytes.flat[hull])
        more_drop, more_sent = (np.concatenate([np.diff(of_one) for of_one in of]) for of in (drops, sent))
        steps = np.argsort(-more_drop / more_sent, kind="stable")  # on a hull each brings less a byte
        drop = sum(of_one[0] for of_one in drops) + np.cumsum([0.0, *more_drop[steps]])
        bytes_ = sum(of_one[0] for of_one in sent) + np.cumsum([0.0, *more_sent[steps]])
        taken = steps[: int(np.argmax(np.log(drop) - self._bounds.bytes_weight * np.log(bytes_)))]
        whose = np.repeat(np.arange(len(hulls)), [len(hull) - 1 for hull in hulls])
        walked = np.bincount(whose[taken], minlength=len(hulls))
        return tuple(self._pace(hull[count]) for hull, count in zip(hulls, walked, strict=True))

    def _hull(self, rounds: float) -> list[int]:
        """Of the choices that last so many full rounds at most, those that some λ prefers."""
        fits = int(np.searchsorted(self._lengths, rounds, side="right"))
        if fits not in self._hulls:
            chosen = np.sort(self._shortest[:fits])
            on_it = upper_left(self._bytes.flat[chosen], self._drop.flat[chosen])
            self._hulls[fits] = chosen[on_it].tolist()
        return self._hulls[fits]

    def _pace(self, choice: int) -> Pace:
        frequency, depth = divmod(choice, self._drop.shape[1])
        return Pace(frequency=frequency + 1, depth=depth + self._bounds.min_depth)

    def score(self, paces: Sequence[Pace]) -> float:
        """Σ loss drop / (T^(1-β) · bytes^β)."""
        pairs = list(zip(self._groups, paces, strict=True))
        drop = sum(a * self._at(self._drop, pace) for a, pace in zip(self._scale, paces, strict=True))
        lasts_s = max(group.round_s * self._at(self._rounds, pace) for group, pace in pairs)
        sent = sum(group.cohort * self._at(self._bytes, pace) for group, pace in pairs)
        beta = self._bounds.bytes_weight
        return drop / math.exp((1 - beta) * math.log(lasts_s) + beta * math.log(sent))
