"""Server optimisers: the folded delta as a pseudo-gradient.

momentum: T.-M. H. Hsu, H. Qi, M. Brown. "Measuring the effects of non-identical data distribution for
federated visual classification". 2019, arXiv 1909.06335 (FedAvgM).
adam, yogi: S. J. Reddi et al. "Adaptive federated optimization". ICLR 2021, arXiv 2003.00295, Algorithm 2.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
import numpy as np
from msgspec import Meta, Struct
from msgspec.structs import replace
from numpy.typing import NDArray

from fedtt.codec.difference import MOST_PLACES
from fedtt.errors import WireError
from fedtt.layout import FactorLayout, LiveSet, Theta

__all__ = [
    "ServerSpec",
    "ServerState",
    "decode_state",
    "encode_state",
    "optimiser_step",
    "published",
    "server_update",
]

Fraction = Annotated[float, Meta(ge=0, lt=1)]
Vector = NDArray[np.float32]
_GREATEST = float(np.finfo(np.float32).max)


class ServerSpec(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the server makes of a folded delta; "sgd" at rate 1 is plain averaging.

    The adaptive optimisers move each number by up to about η a fold, whatever the size of the delta.
    """

    optimiser: Literal["sgd", "momentum", "adam", "yogi"] = "sgd"
    learning_rate: Annotated[float, Meta(gt=0, le=10)] | None = None  #: η; None for `rate`'s own
    momentum: Fraction = 0.9  #: β of FedAvgM, β₁ of the others
    second_moment: Fraction = 0.99  #: β₂
    adaptivity: Annotated[float, Meta(gt=0, le=1)] = 1e-3  #: τ
    binary_places: Annotated[int, Meta(ge=1, le=MOST_PLACES)] | None = None  #: of versions; None for all

    @property
    def rate(self) -> float:
        """η: unless given 1, and 0.01 for the adaptive ones, about what Reddi et al. found best."""
        if self.learning_rate is not None:
            return self.learning_rate
        return 0.01 if self.optimiser in {"adam", "yogi"} else 1.0


class ServerState(Struct, frozen=True, kw_only=True):
    """What a server keeps from fold to fold, beside the factors themselves.

    Moments of factors that are not live in a round stay as they are.
    """

    first: Vector  #: m (P,); (0,) where the optimiser keeps none
    second: Vector  #: v (P,); likewise
    norms: Vector  #: by factor, ‖Δ‖₂ of its last fold, (F,); NaN before its first

    @property
    def is_finite(self) -> bool:
        """Whether later folds can build on it: an infinite second moment would hold its number for ever."""
        return bool(np.isfinite(self.first).all() and np.isfinite(self.second).all())


def server_update(
    spec: ServerSpec, theta: Theta, live: LiveSet, delta: NDArray[np.float64], state: ServerState | None
) -> tuple[Theta, ServerState]:
    """θ_{t+1} and the next state, from the folded delta of the live numbers, (live.size,)."""
    step, state = optimiser_step(spec, live, delta, state)
    return published(spec, theta + live.scatter(step)), state


def optimiser_step(
    spec: ServerSpec, live: LiveSet, delta: NDArray[np.float64], state: ServerState | None
) -> tuple[NDArray[np.float64], ServerState]:
    """How the live numbers move, (live.size,), and the next state."""
    state = _noted(state or _fresh(spec, live.layout), live, delta)
    if spec.optimiser == "sgd":
        return spec.rate * delta, state
    m = live.gather(state.first).astype(np.float64)
    if spec.optimiser == "momentum":
        m = spec.momentum * m + delta  # Hsu et al., FedAvgM: v ← β v + Δ
        return spec.rate * m, _with(state, live, m, None)
    m = spec.momentum * m + (1 - spec.momentum) * delta  # Algorithm 2: m_t
    v, square = live.gather(state.second).astype(np.float64), delta**2
    if spec.optimiser == "adam":
        v = spec.second_moment * v + (1 - spec.second_moment) * square  # its v_t of FedAdam
    else:
        v = v - (1 - spec.second_moment) * square * np.sign(v - square)  # its v_t of FedYogi
    step = spec.rate * m / (np.sqrt(v) + spec.adaptivity)  # its x_{t+1} - x_t
    return step, _with(state, live, m, v)


def published(spec: ServerSpec, theta: NDArray[np.floating[Any]]) -> Theta:
    """theta (P,) as a version, rounded to whole multiples of 2^-`binary_places` where that is given.

    Rounded once, here: devices, folds and the next version all go on from what was published, so what is
    lost is at most half a multiple a fold, and versions differ by whole multiples, which code in few bits.
    """
    if spec.binary_places is None:
        return np.asarray(theta, np.float32)
    multiples = np.rint(np.ldexp(theta.astype(np.float64), spec.binary_places))
    return np.asarray(np.ldexp(multiples, -spec.binary_places) + 0.0, np.float32)  # + 0: no -0


def _fresh(spec: ServerSpec, layout: FactorLayout) -> ServerState:
    """v_{-1} = τ², the least the paper allows."""
    kept = {"sgd": (0, 0), "momentum": (layout.size, 0)}.get(spec.optimiser, (layout.size, layout.size))
    return ServerState(
        first=np.zeros(kept[0], np.float32),
        second=np.full(kept[1], spec.adaptivity**2, np.float32),
        norms=np.full(len(layout.factors), np.nan, np.float32),
    )


def _noted(state: ServerState, live: LiveSet, delta: NDArray[np.float64]) -> ServerState:
    norms = state.norms.copy()
    parts = np.split(delta, np.cumsum(live.sizes)[:-1])
    norms[list(live.indices)] = [min(float(np.linalg.norm(part)), _GREATEST) for part in parts]
    return replace(state, norms=norms)


def _with(
    state: ServerState, live: LiveSet, m: NDArray[np.float64], v: NDArray[np.float64] | None
) -> ServerState:
    first, second = state.first.copy(), state.second.copy()
    first[live.positions] = m
    if v is not None:
        second[live.positions] = v
    return replace(state, first=first, second=second)


def encode_state(state: ServerState) -> bytes:
    """msgpack of three little-endian float32 vectors."""
    vectors = (state.first, state.second, state.norms)
    return msgspec.msgpack.encode([vector.astype("<f4").tobytes() for vector in vectors])


def decode_state(data: bytes) -> ServerState:
    """The inverse; raises WireError for bytes that are no state."""
    try:
        parts = msgspec.msgpack.decode(data, type=tuple[bytes, bytes, bytes])
        first, second, norms = (np.frombuffer(part, "<f4") for part in parts)
    except (msgspec.DecodeError, ValueError) as error:
        raise WireError(f"a stored server state cannot be read: {error}") from None
    return ServerState(first=first, second=second, norms=norms)
