"""Deltas as bytes, in the stages a task declares, each a file of its own:

live set -> error feedback -> sparsify -> quantise, block by block -> plain, or coded where that is shorter
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from fedtt.codec import coded, plain, quantise
from fedtt.codec.sparsify import largest
from fedtt.codec.spec import CodecSpec
from fedtt.errors import LayoutError, WireError
from fedtt.layout import LiveSet

__all__ = [
    "CodecSpec",
    "check_deltas",
    "check_size",
    "compensate",
    "decode_delta",
    "decode_deltas",
    "encode_delta",
    "payload_bytes",
]

Delta = NDArray[np.float32]

_PLAIN, _CODED = b"\0", b"\1"
_F4 = np.dtype("<f4")


def payload_bytes(codec: CodecSpec, live: LiveSet) -> int:
    """The most bytes of a payload of this codec and live set, and with plain coding their exact number."""
    if codec.quantise == "fp32":
        return 4 * live.size
    size = sum(count * plain.encoded_bytes(codec.levels, size) for count, size in _runs(codec, live))
    return size if codec.coding == "plain" else len(_PLAIN) + size


def check_size(codec: CodecSpec, live: LiveSet, size: int) -> None:
    """Raise WireError where no payload of this codec and live set has so many bytes."""
    most = payload_bytes(codec, live)
    if codec.coding == "plain" and size != most:
        raise WireError(f"the payload has {size} bytes, this layout and codec need {most}")
    if size > most:
        raise WireError(f"the payload has {size} bytes, this layout and codec need at most {most}")


def encode_delta(codec: CodecSpec, live: LiveSet, delta: Delta, rng: np.random.Generator) -> bytes:
    """The live numbers (live.size,) as a payload; `rng` is drawn from by stochastic rounding alone.

    Raises LayoutError for another size, WireError for values that are not finite.
    """
    if delta.shape != (live.size,):
        raise LayoutError(f"expected {live.size} live numbers, got shape {delta.shape}")
    if not _all_finite(delta):
        raise WireError("the delta is not finite: training diverged; lower the learning rate")
    if codec.quantise == "fp32":
        return delta.astype(_F4, copy=False).tobytes()
    if codec.keep < 1 or codec.threshold:
        delta = largest(delta, codec.keep, codec.threshold)
    noise = rng if codec.rounding == "stochastic" else None
    sizes = [size for count, size in _runs(codec, live) for _ in range(count)]
    parts = np.split(delta, np.cumsum(sizes)[:-1])
    blocks = [quantise.encode(codec.quantise, part, codec.step, noise) for part in parts]
    packed = plain.encode(codec.levels, blocks)
    if codec.coding == "plain":
        return packed
    short = coded.encode(codec.levels, codec.scale_bits, blocks)
    return _CODED + short if len(short) < len(packed) else _PLAIN + packed


def decode_delta(codec: CodecSpec, live: LiveSet, payload: bytes) -> Delta:
    """The inverse, (live.size,) float32; total over all bytes: a value or a WireError.

    It takes at most six times the result's 4 · live.size bytes of memory, and 2 KiB a factor, whatever the
    bytes say (tests/unit/fedtt/test_decoders_memory.py).
    """
    delta: Delta = decode_deltas(codec, live, (payload,))[0]
    return delta


def decode_deltas(codec: CodecSpec, live: LiveSet, payloads: Sequence[bytes]) -> Delta:
    """Those of several updates, (n, live.size); a WireError where any of them is not sound.

    Memory as of `decode_delta`, of n results and once for each factor.
    """
    for payload in payloads:
        check_size(codec, live, len(payload))
    if codec.coding == "range":
        deltas = np.empty((len(payloads), live.size), np.float32)
        for delta, payload in zip(deltas, payloads, strict=True):
            _put(_coded_runs(codec, live, payload), delta[None])
    elif codec.quantise == "fp32":
        joined = payloads[0] if len(payloads) == 1 else b"".join(payloads)
        deltas = np.frombuffer(joined, _F4).astype(np.float32, copy=False).reshape(len(payloads), -1)
    else:
        deltas = np.empty((len(payloads), live.size), np.float32)
        _put(_plain_runs(codec, live, payloads), deltas)
    if not _all_finite(deltas):
        raise WireError("the update holds NaN or infinite factors")
    return deltas


def check_deltas(codec: CodecSpec, live: LiveSet, payloads: Sequence[bytes]) -> None:
    """Raise WireError where `decode_deltas` would; plain integers, as long as they are small, stay such."""
    if codec.quantise != "fp32" and codec.coding == "plain":
        for payload in payloads:
            check_size(codec, live, len(payload))
        runs = _plain_runs(codec, live, payloads)
        if all(quantise.surely_finite(codec.levels, words) for _, words in runs):
            return
    decode_deltas(codec, live, payloads)


def compensate(codec: CodecSpec, live: LiveSet, delta: Delta, residual: Delta) -> tuple[bytes, Delta]:
    """Error feedback (Seide et al. 2014; Karimireddy et al. 2019, EF-SGD).

    p = Δ + e,  sent = C(p),  e' = p - sent.  Returns the payload and e'; the caller keeps e until the
    payload is acknowledged, so that a refused update loses nothing.
    """
    target = delta + residual  # EF-SGD: p ← Δ + e, then C(p), then e' ← p - C(p)
    payload = encode_delta(codec, live, target, np.random.default_rng(0))
    return payload, target - decode_delta(codec, live, payload)


def _all_finite(numbers: Delta) -> bool:
    """A sum of squares that is finite says so in one pass; one that is not may only be too large."""
    return math.isfinite(np.vdot(numbers, numbers)) or bool(np.isfinite(numbers).all())


@lru_cache(maxsize=64)
def _runs(codec: CodecSpec, live: LiveSet) -> tuple[plain.Run, ...]:
    """The blocks that share a scale, as many as have one size together: none reaches over two factors."""
    runs: list[plain.Run] = []
    for size in live.sizes:
        whole, rest = divmod(size, codec.block or size)
        runs += [run for run in ((whole, codec.block or size), (1, rest)) if all(run)]
    return tuple(runs)


def _plain_runs(codec: CodecSpec, live: LiveSet, payloads: Sequence[bytes]) -> list[plain.Decoded]:
    rows = np.frombuffer(b"".join(payloads), np.uint8).reshape(len(payloads), -1)
    return plain.decode(codec.levels, rows, _runs(codec, live))


def _coded_runs(codec: CodecSpec, live: LiveSet, payload: bytes) -> list[plain.Decoded]:
    """Of one update."""
    if payload[:1] == _CODED:
        return coded.decode(codec.levels, codec.scale_bits, payload[1:], _runs(codec, live))
    if payload[:1] != _PLAIN or len(payload) != payload_bytes(codec, live):
        raise WireError("the payload is neither coded nor plain")
    return _plain_runs(codec, live, (payload[1:],))


def _put(runs: list[plain.Decoded], deltas: Delta) -> None:
    """The numbers of n updates into their places (n, live.size)."""
    start = 0
    for q, words in runs:
        end = start + math.prod(q.shape[1:])
        deltas[:, start:end] = quantise.decode(q, words).reshape(len(q), -1)
        start = end
