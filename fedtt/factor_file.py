"""Theta out of a file of factors: safetensors with exactly the factors of a layout, in float32.

The format (github.com/huggingface/safetensors, "Format"): the size of a header in eight bytes, the header,
which is JSON, then the numbers, little-endian, each factor's between two offsets. A file that leaves a byte
out, or has one serve twice, is refused.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Final

import msgspec
import numpy as np
from msgspec import Meta, Raw, Struct
from numpy.typing import NDArray

from fedtt.errors import BundleError, LayoutError
from fedtt.layout import FactorLayout, Theta

__all__ = ["decode_factors"]

_SIZE_BYTES = 8
_HEADER_LIMIT_BYTES = 1 << 14  #: and of each factor
_ENTRY_LIMIT_BYTES = 512  #: ours have up to 110
_METADATA, _FLOAT32 = "__metadata__", "F32"

Offset = Annotated[int, Meta(ge=0, lt=2**48)]


class _Entry(Struct, frozen=True, forbid_unknown_fields=True):
    dtype: str
    shape: tuple[Offset, ...]
    data_offsets: tuple[Offset, Offset]


_HEADER: Final = msgspec.json.Decoder(dict[str, Raw])  #: made here, as `fedtt.manifest` says why
_ENTRY: Final = msgspec.json.Decoder(_Entry)
_TEXTS: Final = msgspec.json.Decoder(dict[str, str])


def decode_factors(data: bytes, layout: FactorLayout, where: str, remedy: str) -> Theta:
    """Theta (P,); takes twice the memory of `data`, 8 KiB for each factor and 512 KiB, at most.

    Raises BundleError for what is no such file and LayoutError for other factors, with `where` and `remedy`.
    """
    try:
        return layout.flatten(_tensors(memoryview(data), len(layout.factors)))
    except LayoutError as error:
        raise LayoutError(f"{where}: {error}; {remedy}") from None
    except (ValueError, RecursionError) as error:  # a DecodeError and a UnicodeDecodeError are ValueErrors
        raise BundleError(f"{where} is not a safetensors file of factors ({error}): {remedy}") from None


def _tensors(data: memoryview, factors: int) -> dict[str, NDArray[np.floating[Any]]]:
    """All that the file has, as views; raises ValueError where it lies."""
    size = int.from_bytes(data[:_SIZE_BYTES], "little")
    most = min(len(data) - _SIZE_BYTES, _HEADER_LIMIT_BYTES + _ENTRY_LIMIT_BYTES * factors)
    if size > most:
        raise ValueError(f"a header of {size} bytes where at most {max(most, 0)} can be")
    header = _HEADER.decode(data[_SIZE_BYTES : _SIZE_BYTES + size])
    if _METADATA in header:
        _TEXTS.decode(header.pop(_METADATA))
    body = data[_SIZE_BYTES + size :]
    entries = {name: _ENTRY.decode(entry) for name, entry in header.items()}
    end = 0
    for name, entry in sorted(entries.items(), key=lambda each: each[1].data_offsets):
        start, stop = entry.data_offsets
        if entry.dtype != _FLOAT32:
            raise ValueError(f"{name[:100]!r} is in {entry.dtype[:20]!r}, factors are in {_FLOAT32!r}")
        if start != end or stop - start != 4 * math.prod(entry.shape):
            raise ValueError(f"{name[:100]!r} of another shape lies from byte {start} to {stop}, after {end}")
        end = stop
    if end != len(body):
        raise ValueError(f"{end} bytes of numbers where {len(body)} are")
    flat = np.frombuffer(body, "<f4")
    return {
        name: flat[entry.data_offsets[0] // 4 : entry.data_offsets[1] // 4].reshape(entry.shape)
        for name, entry in entries.items()
    }
