"""Deltas as bytes: the stages a task declares, in the order live set -> error feedback -> quantise."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from fedtt.codec import quantise
from fedtt.errors import ConfigError, LayoutError, WireError
from fedtt.layout import LiveSet

__all__ = ["CodecSpec", "compensate", "decode_delta", "decode_deltas", "encode_delta", "payload_bytes"]

Delta = NDArray[np.float32]

BITS = {"fp32": 32, "int8": 8, "int4": 4}


class CodecSpec(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How a task's deltas travel.

    Error feedback needs a contractive quantiser: rounding to nearest brings every value at least half a
    step near, while stochastic rounding may move it a whole one and let the residual grow.
    """

    quantise: Literal["fp32", "int8", "int4"] = "int4"
    rounding: Literal["nearest", "stochastic"] = "nearest"
    error_feedback: bool = False

    def __post_init__(self) -> None:
        if self.error_feedback and (self.rounding != "nearest" or self.quantise == "fp32"):
            raise ConfigError(
                "codec.error_feedback",
                True,
                "only with rounding = 'nearest' and quantise = 'int8' or 'int4'",
            )

    @property
    def bits(self) -> int:
        return BITS[self.quantise]


def payload_bytes(codec: CodecSpec, live: LiveSet) -> int:
    """The exact size of every payload of this codec and live set, known before a byte is read."""
    bits = codec.bits
    return sum([quantise.encoded_bytes(bits, size) for size in _pieces(bits, live)])


def _pieces(bits: int, live: LiveSet) -> tuple[int, ...]:
    """Sizes of what is coded by itself: each factor, with its own scale; without scales all are one."""
    return (live.size,) if bits == quantise.PLAIN else live.sizes


def encode_delta(codec: CodecSpec, live: LiveSet, delta: Delta, rng: np.random.Generator) -> bytes:
    """The live numbers (live.size,) as a payload; `rng` is drawn from by stochastic rounding alone.

    Raises LayoutError for another size, WireError for values that are not finite.
    """
    if delta.shape != (live.size,):
        raise LayoutError(f"expected {live.size} live numbers, got shape {delta.shape}")
    if not np.isfinite(delta).all():
        raise WireError("the delta is not finite: training diverged; lower the learning rate")
    noise = rng if codec.rounding == "stochastic" else None
    parts, start = [], 0
    for size in _pieces(codec.bits, live):
        parts.append(quantise.encode(codec.bits, delta[start : start + size], noise))
        start += size
    return b"".join(parts)


def decode_delta(codec: CodecSpec, live: LiveSet, payload: bytes) -> Delta:
    """The inverse, (live.size,) float32; total over all bytes: a value or a WireError."""
    delta: Delta = decode_deltas(codec, live, (payload,))[0]
    return delta


def decode_deltas(codec: CodecSpec, live: LiveSet, payloads: Sequence[bytes]) -> Delta:
    """Those of several updates, (n, live.size); a WireError where any of them is not sound."""
    expected, bits = payload_bytes(codec, live), codec.bits
    for payload in payloads:
        if len(payload) != expected:
            raise WireError(f"the payload has {len(payload)} bytes, this layout and codec need {expected}")
    rows = np.frombuffer(b"".join(payloads), np.uint8).reshape(len(payloads), expected)
    parts, start = [], 0
    for size in _pieces(bits, live):
        end = start + quantise.encoded_bytes(bits, size)
        parts.append(quantise.decode(bits, rows[:, start:end], size))
        start = end
    deltas = parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1)
    if not np.isfinite(deltas).all():
        raise WireError("the update holds NaN or infinite factors")
    return deltas


def compensate(codec: CodecSpec, live: LiveSet, delta: Delta, residual: Delta) -> tuple[bytes, Delta]:
    """Error feedback (Seide et al. 2014; Karimireddy et al. 2019, Algorithm 2).

    p = Δ + e,  sent = Q(p),  e' = p - sent.  Returns the payload and e'; the caller keeps e until the
    payload is acknowledged, so that a refused update loses nothing.
    """
    target = delta + residual
    payload = encode_delta(codec, live, target, np.random.default_rng(0))
    return payload, target - decode_delta(codec, live, payload)
