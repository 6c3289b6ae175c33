"""Which devices a round invites.

power-of-choice: Y. J. Cho, J. Wang, G. Joshi. "Client selection in federated learning: convergence analysis
and power-of-choice selection strategies". 2020, arXiv 2010.01243.
oort: F. Lai, X. Zhu, H. V. Madhyastha, M. Chowdhury. "Oort: efficient federated learning via guided
participant selection". OSDI 2021, arXiv 2010.06081.
Separation and cap: C. A. Choquette-Choo et al. "(Amplified) banded matrix factorization: a unified approach
to private training". NeurIPS 2023, arXiv 2306.08153 (b-min-sep participation).
Weighted draws: P. S. Efraimidis, P. G. Spirakis. "Weighted random sampling with a reservoir". Information
Processing Letters 97(5), 2006.
Lots: the cohort are those whose keyed hashes are lowest, so that rounds to come can be foretold: the
cryptographic sortition of Y. Gilad et al. "Algorand". SOSP 2017, §5, with one key, the server's.

Draws are by a secret of the task, hexadecimal: whoever knew it could make keys of devices that are drawn
together. What a device reports of itself, examples and loss, is bounded before it counts.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from hashlib import blake2b
from typing import Annotated, ClassVar

import numpy as np
from msgspec import Meta, Struct
from numpy.typing import NDArray

from fedtt.errors import ConfigError
from fedtt.rng import Purpose, rng_for

__all__ = [
    "FORETOLD_ROUNDS",
    "ByExamples",
    "Candidate",
    "Oort",
    "PowerOfChoice",
    "Sampling",
    "Uniform",
    "invite",
    "next_turn",
    "uniformly",
]

Positions = NDArray[np.intp]
Weights = NDArray[np.float64]
Share = Annotated[float, Meta(ge=0, le=1)]
Count = Annotated[int, Meta(ge=1, le=10**9)]

_CLIP = 0.95  #: share of the known devices above which a loss or a utility counts no more, as in Oort
_LOSS_LIMIT = 1e6
FORETOLD_ROUNDS = 64  #: that a device's next turn is looked for in
_ROUND = struct.Struct("<Q")


class Candidate(Struct, frozen=True, kw_only=True):
    """A device that could be invited, and what its updates to the task have shown so far."""

    device_id: str
    examples: int  #: as reported
    memory_mb: int = 0  #: as reported; 0 where it did not say
    count: int = 0  #: updates acknowledged
    last_round: int | None = None  #: that took its last
    last_loss: float | None = None  #: of the first local step of its last, as reported
    duration_s: float | None = None  #: from the lease of its last to the receipt


class _Strategy(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="strategy"):
    """How a cohort is drawn, and how often one device may take part whatever the draw."""

    always_uniform: ClassVar[bool] = False

    separation: Annotated[int, Meta(ge=0, le=10**6)] = 0  #: b, rounds from one update of a device to its next
    participation_cap: Count | None = None  #: k, most updates of one device; None for any number

    @property
    def is_limited(self) -> bool:
        """Whether a device's past can keep it out of a round."""
        return self.separation > 0 or self.participation_cap is not None

    @property
    def is_plain(self) -> bool:
        """Whether nothing but the names of devices matters."""
        return self.always_uniform and not self.is_limited

    def refusal(self, count: int, last_round: int, round_number: int) -> str | None:
        """Why a device with `count` ≥ 1 updates, the last in `last_round`, sits a round out, or None."""
        if self.participation_cap is not None and count >= self.participation_cap:
            return f"it has sent {count} updates, the task takes {self.participation_cap} of a device"
        if self.separation and round_number < last_round + self.separation:
            return f"it may send its next update in round {last_round + self.separation}"
        return None

    def choose(
        self, able: Sequence[Candidate], seats: int, round_number: int, rng: np.random.Generator
    ) -> Positions:
        """`seats` < len(able) positions in `able`, in any order; of a uniform draw they go by lots."""
        raise NotImplementedError


class Uniform(_Strategy, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="uniform"):
    """Every device alike, without replacement."""

    always_uniform: ClassVar[bool] = True


class ByExamples(_Strategy, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="examples"):
    """In proportion to the examples a device reports, up to a bound."""

    max_examples: Count = 1000

    def choose(
        self, able: Sequence[Candidate], seats: int, round_number: int, rng: np.random.Generator
    ) -> Positions:
        return _weighted(rng, _examples(able, self.max_examples), seats)


class PowerOfChoice(_Strategy, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="power-of-choice"):
    """Of `candidates` drawn by their data, those with the highest loss (π_rpow-d of §4: as each sent it).

    The loss of a device that has sent none is infinite.
    """

    candidates: Count  #: d, from the cohort upwards
    max_examples: Count = 1000

    def choose(
        self, able: Sequence[Candidate], seats: int, round_number: int, rng: np.random.Generator
    ) -> Positions:
        drawn = _weighted(rng, _examples(able, self.max_examples), max(seats, self.candidates))
        losses = np.full(len(able), np.inf)
        known = np.array([i for i, c in enumerate(able) if c.last_loss is not None], np.intp)
        if len(known):
            losses[known] = _clipped(_losses([able[i] for i in known]))
        return drawn[np.argsort(-losses[drawn], kind="stable")[:seats]]


class Oort(_Strategy, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="oort"):
    """Devices of high loss whose answers come soon, beside some that are not known yet (Algorithm 1).

    Differs from the paper where a server that sees no example and asks no device beforehand must: the loss
    of one batch stands for the root mean square over a device's examples, unknown devices are explored
    uniformly, and the preferred duration is a quantile of the known ones, as in the authors' code, without
    its pacer. Utilities are taken relative to their bound, so that the term for uncertainty has a scale.
    """

    exploration: Share = 0.9  #: ε in the first round
    exploration_decay: Share = 0.98  #: by which it falls each round
    least_exploration: Share = 0.2
    penalty: Annotated[float, Meta(ge=0, le=10)] = 2.0  #: α
    prompt_share: Share = 0.5  #: of the known devices that answer within the preferred duration T
    cutoff: Share = 0.95  #: c
    max_examples: Count = 1000

    def __post_init__(self) -> None:
        if self.least_exploration > self.exploration:
            raise ConfigError(
                "sampling.least_exploration",
                self.least_exploration,
                f"at most sampling.exploration = {self.exploration:g}",
            )

    def choose(
        self, able: Sequence[Candidate], seats: int, round_number: int, rng: np.random.Generator
    ) -> Positions:
        known = np.array([i for i, c in enumerate(able) if c.last_loss is not None], np.intp)
        unknown = np.array([i for i, c in enumerate(able) if c.last_loss is None], np.intp)
        epsilon = max(self.least_exploration, self.exploration * self.exploration_decay ** (round_number - 1))
        explored = seats - min(int(seats * (1 - epsilon) + 1e-9), len(known))
        explored = min(explored, len(unknown))
        exploited = seats - explored
        chosen = unknown[_uniform(rng, len(unknown), explored)]
        if exploited:
            scores = self.utilities([able[i] for i in known], round_number)
            threshold = self.cutoff * np.sort(scores)[-exploited]
            admitted = np.flatnonzero(scores >= threshold)
            best = admitted[_weighted(rng, scores[admitted], exploited)]
            chosen = np.concatenate([chosen, known[best]])
        return chosen

    def utilities(self, known: Sequence[Candidate], round_number: int) -> Weights:
        """Util(i) of devices that have sent updates, (n,)."""
        statistical = _clipped(_examples(known, self.max_examples) * _losses(known))
        statistical /= max(statistical.max(), np.finfo(float).tiny)
        last = np.array([c.last_round or round_number for c in known], np.float64)
        uncertain = np.sqrt(0.1 * np.log(round_number) / last)
        taken_s = np.maximum([c.duration_s or 0.0 for c in known], 1e-3)
        preferred_s = np.quantile(taken_s, self.prompt_share)
        return np.asarray((statistical + uncertain) * np.minimum(1.0, preferred_s / taken_s) ** self.penalty)


Sampling = Uniform | ByExamples | PowerOfChoice | Oort


def invite(
    sampling: Sampling, draw_key: str, round_number: int, candidates: Sequence[Candidate], seats: int
) -> tuple[str, ...]:
    """The names of at most `seats` candidates that may take part, in the order they came in.

    The same candidates in the same order give the same cohort.
    """
    able = [
        c
        for c in candidates
        if c.last_round is None or sampling.refusal(c.count, c.last_round, round_number) is None
    ]
    if sampling.always_uniform:
        return uniformly(draw_key, round_number, [c.device_id for c in able], seats)
    if len(able) > seats:
        rng = rng_for(_seed(draw_key), Purpose.SAMPLING, round_number)
        chosen = sampling.choose(able, seats, round_number, rng)
        able = [able[i] for i in np.sort(chosen)]
    return tuple(c.device_id for c in able)


def uniformly(draw_key: str, round_number: int, devices: Sequence[str], seats: int) -> tuple[str, ...]:
    """Those `seats` of the devices whose lots are lowest, in the order they came in; all where they are few.

    Each is as likely as any other, and whether it is drawn does not depend on where it stands.
    """
    if len(devices) <= seats:
        return tuple(devices)
    of_round = _keyed(draw_key, round_number)
    lots = np.array([_lot(of_round, bytes.fromhex(device)) for device in devices])
    chosen = np.sort(np.argpartition(lots, seats - 1)[:seats])
    return tuple(devices[i] for i in chosen)


def next_turn(draw_key: str, device_id: str, after: int, seats: int, drawn_from: int) -> int:
    """The first round past `after` for which `uniformly` may draw this device, should few come or go.

    seats: of a round. drawn_from: devices that the newest cohort was drawn from. The highest lot of a cohort
    is about seats / drawn_from; what is taken in its place is so much higher that it misses one round of a
    hundred for one seat, and fewer for more. At the latest the round FORETOLD_ROUNDS past `after`.
    """
    share = seats * (1 + 4 / seats**0.5) / max(drawn_from, 1)
    name = bytes.fromhex(device_id)
    for number in range(after + 1, after + FORETOLD_ROUNDS):
        if _lot(_keyed(draw_key, number), name) < share:
            return number
    return after + FORETOLD_ROUNDS


def _keyed(draw_key: str, round_number: int) -> blake2b:
    """The hash of a round, to go on with the name of a device."""
    return blake2b(_ROUND.pack(round_number), key=bytes.fromhex(draw_key), digest_size=8)


def _seed(draw_key: str) -> int:
    return int.from_bytes(_keyed(draw_key, 0).digest(), "little")


def _lot(of_round: blake2b, name: bytes) -> float:
    """In [0, 1), a multiple of 2^-53."""
    found = of_round.copy()
    found.update(name)
    return (int.from_bytes(found.digest(), "little") >> 11) * 2.0**-53


def _uniform(rng: np.random.Generator, count: int, seats: int) -> Positions:
    return rng.choice(count, size=seats, replace=False)


def _weighted(rng: np.random.Generator, weights: Weights, seats: int) -> Positions:
    """Positions drawn one by one without replacement, each by its weight among those that are left.

    The largest u^(1/w) for uniform u (Efraimidis & Spirakis), as the smallest -ln(u) / w.
    """
    floor = 1e-12 * max(float(weights.max()), 1.0)
    keys = rng.exponential(size=len(weights)) / np.maximum(weights, floor)
    return np.argsort(keys, kind="stable")[:seats]


def _examples(candidates: Sequence[Candidate], most: int) -> Weights:
    return np.array([min(c.examples, most) for c in candidates], np.float64)


def _losses(candidates: Sequence[Candidate]) -> Weights:
    return np.clip([c.last_loss or 0.0 for c in candidates], 0.0, _LOSS_LIMIT)


def _clipped(values: Weights) -> Weights:
    """No value above the one below which a share of all lie: a single device cannot set the bound."""
    return np.minimum(values, np.quantile(values, _CLIP, method="lower"))
