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


def payload_bytes(codec: CodecSpec, live: LiveSet) -> int:
    """The most bytes of a payload of this codec and live set, and with plain coding their exact number."""
    if codec.quantise == "fp32":
        return 4 * live.size
    size = sum(plain.encoded_bytes(codec.levels, size) for size in _blocks(codec, live))
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
        return delta.astype("<f4").tobytes()
    if codec.keep < 1 or codec.threshold:
        delta = largest(delta, codec.keep, codec.threshold)
    noise = rng if codec.rounding == "stochastic" else None
    parts = np.split(delta, np.cumsum(_blocks(codec, live))[:-1])
    blocks = [quantise.encode(codec.quantise, part, codec.step, noise) for part in parts]
    packed = plain.encode(codec.levels, blocks)
    if codec.coding == "plain":
        return packed
    short = coded.encode(codec.levels, codec.scale_bits, blocks)
    return _CODED + short if len(short) < len(packed) else _PLAIN + packed


def decode_delta(codec: CodecSpec, live: LiveSet, payload: bytes) -> Delta:
    """The inverse, (live.size,) float32; total over all bytes: a value or a WireError."""
    delta: Delta = decode_deltas(codec, live, (payload,))[0]
    return delta


def decode_deltas(codec: CodecSpec, live: LiveSet, payloads: Sequence[bytes]) -> Delta:
    """Those of several updates, (n, live.size); a WireError where any of them is not sound."""
    for payload in payloads:
        check_size(codec, live, len(payload))
    if codec.coding == "range":
        deltas = np.concatenate([_decode_coded(codec, live, payload) for payload in payloads])
    elif codec.quantise == "fp32":
        joined = payloads[0] if len(payloads) == 1 else b"".join(payloads)
        deltas = np.frombuffer(joined, "<f4").astype(np.float32, copy=False).reshape(len(payloads), -1)
    else:
        deltas = _joined(_plain_blocks(codec, live, payloads))
    if not _all_finite(deltas):
        raise WireError("the update holds NaN or infinite factors")
    return deltas


def check_deltas(codec: CodecSpec, live: LiveSet, payloads: Sequence[bytes]) -> None:
    """Raise WireError where `decode_deltas` would; plain integers, as long as they are small, stay such."""
    if codec.quantise != "fp32" and codec.coding == "plain":
        for payload in payloads:
            check_size(codec, live, len(payload))
        blocks = _plain_blocks(codec, live, payloads)
        if all(quantise.surely_finite(codec.levels, words) for _, words in blocks):
            return
    decode_deltas(codec, live, payloads)


def compensate(codec: CodecSpec, live: LiveSet, delta: Delta, residual: Delta) -> tuple[bytes, Delta]:
    """Error feedback (Seide et al. 2014; Karimireddy et al. 2019, Algorithm 2).

    p = Δ + e,  sent = C(p),  e' = p - sent.  Returns the payload and e'; the caller keeps e until the
    payload is acknowledged, so that a refused update loses nothing.
    """
    target = delta + residual
    payload = encode_delta(codec, live, target, np.random.default_rng(0))
    return payload, target - decode_delta(codec, live, payload)


def _all_finite(numbers: Delta) -> bool:
    """A sum of squares that is finite says so in one pass; one that is not may only be too large."""
    return math.isfinite(np.vdot(numbers, numbers)) or bool(np.isfinite(numbers).all())


@lru_cache(maxsize=64)
def _blocks(codec: CodecSpec, live: LiveSet) -> tuple[int, ...]:
    """Sizes of the blocks that share a scale: none reaches over two factors."""
    sizes: list[int] = []
    for size in live.sizes:
        whole, rest = divmod(size, codec.block or size)
        sizes += [codec.block or size] * whole + ([rest] if rest else [])
    return tuple(sizes)


def _plain_blocks(
    codec: CodecSpec, live: LiveSet, payloads: Sequence[bytes]
) -> list[tuple[quantise.Integers, plain.Words]]:
    rows = np.frombuffer(b"".join(payloads), np.uint8).reshape(len(payloads), -1)
    return plain.decode(codec.levels, rows, _blocks(codec, live))


def _decode_coded(codec: CodecSpec, live: LiveSet, payload: bytes) -> Delta:
    """One update, (1, live.size)."""
    if payload[:1] == _CODED:
        return _joined(coded.decode(codec.levels, codec.scale_bits, payload[1:], _blocks(codec, live)))
    if payload[:1] != _PLAIN or len(payload) != payload_bytes(codec, live):
        raise WireError("the payload is neither coded nor plain")
    return _joined(_plain_blocks(codec, live, (payload[1:],)))


def _joined(blocks: list[tuple[quantise.Integers, plain.Words]]) -> Delta:
    return np.concatenate([quantise.decode(*block) for block in blocks], axis=1)
