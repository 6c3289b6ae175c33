"""Frames: the bytes of one update, and of one version, as they travel.

An update frame (all integers little-endian; docs/protocol.md has one in hex):

    0   4  b"fTT1"
    4   2  header bytes h
    6   4  payload bytes p
    10  h  header: a msgpack array (see `UpdateHeader`)
    .   p  payload: the coded delta (see `fedtt.codec`)
    .   4  CRC-32 of all that stands before it

A version is theta itself, little-endian float32; its name is the sha256 of those bytes.
"""

from __future__ import annotations

import hashlib
import math
import struct
import zlib
from functools import lru_cache
from typing import Annotated

import msgspec
import numpy as np
from msgspec import Meta, Struct

from fedtt.errors import WireError
from fedtt.label_counts import decode_label_counts
from fedtt.layout import FactorLayout, Theta

__all__ = [
    "UpdateHeader",
    "decode_theta",
    "decode_update",
    "encode_theta",
    "encode_update",
    "layout_tag",
    "update_digest",
    "update_limit_bytes",
    "version_digest",
    "with_label_counts",
    "zeros_digest",
]

_MAGIC = b"fTT1"
_PREFIX = struct.Struct("<4sHI")
_CRC = struct.Struct("<I")
_HEADER_LIMIT_BYTES = 256

Count = Annotated[int, Meta(ge=0, le=2**32)]


class UpdateHeader(Struct, frozen=True, kw_only=True, array_like=True, forbid_unknown_fields=True):
    """What a device says about its delta."""

    layout: Annotated[bytes, Meta(min_length=8, max_length=8)]  #: `layout_tag` of the layout it trained
    examples: Count  #: the examples on the device the update stands for
    steps: Count  #: local optimiser steps taken
    loss_first: float  #: training loss of the first local step
    loss_last: float  #: and of the last
    label_counts: bytes = (
        b""  #: where asked for and shared (`fedtt.label_counts`); else the array ends before
    )


_HEADER = msgspec.msgpack.Decoder(UpdateHeader)  #: made here, as `fedtt.manifest` says why


def layout_tag(layout: FactorLayout) -> bytes:
    """The first 8 bytes of the layout's digest."""
    return bytes.fromhex(layout.digest)[:8]


def update_limit_bytes(payload_bytes: int, labels: int = 0) -> int:
    """The longest frame that can carry a payload of this size, and the counts of so many labels."""
    return _PREFIX.size + _header_limit_bytes(labels) + payload_bytes + _CRC.size


def _header_limit_bytes(labels: int) -> int:
    return _HEADER_LIMIT_BYTES + 2 * labels


def encode_update(header: UpdateHeader, payload: bytes) -> bytes:
    fields = msgspec.structs.astuple(header)
    head = msgspec.msgpack.encode(fields if header.label_counts else fields[:-1])
    start = _PREFIX.pack(_MAGIC, len(head), len(payload)) + head
    return b"".join((start, payload, _CRC.pack(zlib.crc32(payload, zlib.crc32(start)))))


def with_label_counts(frame: bytes, counts: bytes) -> bytes:
    """The same update, telling these counts too."""
    header, payload = decode_update(frame)
    return encode_update(msgspec.structs.replace(header, label_counts=counts), payload)


def decode_update(frame: bytes, labels: int = 0) -> tuple[UpdateHeader, bytes]:
    """Header and payload; any bytes give a value or a WireError, in at most twice their memory and 64 KiB.

    labels: of which the frame may bring counts; 0 where they were not asked for.
    """
    if len(frame) < _PREFIX.size + _CRC.size:
        raise WireError(f"an update of {len(frame)} bytes is cut short: send the frame whole")
    magic, head_bytes, payload_bytes = _PREFIX.unpack_from(frame)
    if magic != _MAGIC:
        raise WireError(f"an update begins with {_MAGIC!r}, this one with {magic!r}")
    expected = _PREFIX.size + head_bytes + payload_bytes + _CRC.size
    if len(frame) != expected:
        raise WireError(f"an update says it has {expected} bytes, {len(frame)} came: send the frame whole")
    limit_bytes = _header_limit_bytes(labels)
    if head_bytes > limit_bytes:
        raise WireError(f"an update's header has {head_bytes} bytes, at most {limit_bytes} are read")
    if zlib.crc32(memoryview(frame)[: -_CRC.size]) != _CRC.unpack_from(frame, len(frame) - _CRC.size)[0]:
        raise WireError("an update's checksum does not match: it was damaged on its way, send it again")
    split = _PREFIX.size + head_bytes
    try:
        header = _HEADER.decode(frame[_PREFIX.size : split])
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise WireError(f"an update's header is not valid: {error}") from None
    if not (math.isfinite(header.loss_first) and math.isfinite(header.loss_last)):
        raise WireError("an update's losses are not finite")
    if header.label_counts:
        decode_label_counts(header.label_counts, labels)
    return header, frame[split : -_CRC.size]


@lru_cache(maxsize=1)
def update_digest(frame: bytes) -> str:
    """The sha256 of a frame; kept for the newest, of which an emulator asks at both ends."""
    return hashlib.sha256(frame).hexdigest()


def encode_theta(theta: Theta) -> bytes:
    """The canonical bytes of a version."""
    return theta.astype("<f4").tobytes()


def decode_theta(data: bytes, layout: FactorLayout, digest: str) -> Theta:
    """Theta (P,) from a version's bytes, checked against its size, its name and for finiteness.

    It takes at most twice the 4 P bytes of memory.
    """
    if len(data) != 4 * layout.size:
        raise WireError(f"a version of {len(data)} bytes came, this layout needs {4 * layout.size}")
    if version_digest(data) != digest:
        raise WireError(f"a version's bytes do not match its sha256 {digest[:12]}…: download it again")
    theta = np.frombuffer(data, "<f4").astype(np.float32)
    if not np.isfinite(theta).all():
        raise WireError("a version holds NaN or infinite factors")
    return theta


def version_digest(data: bytes) -> str:
    """The name of a version: sha256 of its canonical bytes."""
    return hashlib.sha256(data).hexdigest()


@lru_cache(maxsize=16)
def zeros_digest(size_bytes: int) -> str:
    """The name of the version that is all zeros, which a device holds that holds no other."""
    return version_digest(bytes(size_bytes))
