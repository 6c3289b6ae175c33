"""What lies where in an ExecuTorch file of weights (`.ptd`), read before a runtime maps it.

A header, the tables of ExecuTorch's flat_tensor.fbs, and behind them the bytes of all tensors. A runtime
takes what the tables say of types, sizes and places as it stands, so a file that lies is refused whole.
"""

from __future__ import annotations

import math
from typing import Final, NamedTuple

from fedtt.errors import BundleError
from fedtt.flat_buffer import field, inner, number, text, vector

__all__ = ["StoredData", "stored_data"]

_MOST_NAMES = 8192  #: ours have up to 700
_MOST_DIMENSIONS = 16  #: of a tensor, in ExecuTorch
_LONGEST_NAME_BYTES = 200
_IDENTIFIER, _HEADER = b"FT01", b"FH01"
_HEAD_BYTES, _HEADER_BYTES = 64, 40  #: which a runtime reads at first; of them the header, from byte 8
_VERSION = 0  #: of the tables
_ALIGNED_BYTES = 16  #: tensors are read in place; ours begin at each 128th byte
_TENSOR = "t"  #: begins the names of ours; those of what XNNPACK packs are in hexadecimal, or begin otherwise
_BYTES: Final = {0: 1, 1: 1, 3: 4, 4: 8, 5: 2, 6: 4, 7: 8, 11: 1}  #: of a number, by ExecuTorch's types


class StoredData(NamedTuple):
    """One name's data."""

    start: int  #: byte of the file
    stop: int
    type: int | None  #: ExecuTorch's number of it; None of data that is no tensor
    sizes: tuple[int, ...]


def stored_data(data: bytes | memoryview, name: str) -> dict[str, StoredData]:
    """What a file of weights stores, by name; raises BundleError where it is none of ours, or lies.

    Reads its tables alone, of 8,192 names at most, and takes 8 MiB of memory at most.
    """
    try:
        return _read(memoryview(data))
    except ValueError as error:
        raise BundleError(
            f"{name} cannot be loaded: it is no file of weights of fedtt ({error}); download the bundle again"
        ) from None


def _read(data: memoryview) -> dict[str, StoredData]:
    tables, base, size = _parts(data)
    root = inner(tables, 0)
    if version := _whole(tables, root, 0, 4):
        raise ValueError(f"version {version} of its tables, this client knows {_VERSION}")
    segments, named = vector(tables, root, 1), vector(tables, root, 2)
    if segments is None or named is None:
        raise ValueError("it has no tables of its data")
    if max(len(segments), len(named)) > _MOST_NAMES:
        raise ValueError(f"more than {_MOST_NAMES} names")
    extents = [_extent(tables, inner(tables, at), size) for at in segments]
    found: dict[str, StoredData] = {}
    for at in named:
        key, stored = _named(tables, inner(tables, at), extents, base)
        if key in found:
            raise ValueError(f"two of the name {key!r}")
        found[key] = stored
    return found


def _parts(data: memoryview) -> tuple[memoryview, int, int]:
    """The tables, with all before them, and where the data of tensors begins and how long it is."""
    if len(data) < _HEAD_BYTES or data[4:8] != _IDENTIFIER or data[8:12] != _HEADER:
        raise ValueError(f"it does not begin as {_IDENTIFIER.decode()} does")
    if (length := number(data, 12, 4)) < _HEADER_BYTES:
        raise ValueError(f"a header of {length} bytes")
    start, length, base, size = (number(data, at, 8) for at in range(16, 48, 8))
    if start + length > base or base + size != len(data):
        raise ValueError(
            f"tables from byte {start} to {start + length}, data from {base} to {base + size}, of {len(data)}"
        )
    if base % _ALIGNED_BYTES:
        raise ValueError(f"data from byte {base}, which is no multiple of {_ALIGNED_BYTES}")
    return data[: start + length], base, size


def _extent(tables: memoryview, segment: int, size: int) -> tuple[int, int]:
    """From where to where a segment lies in the data."""
    start, length = _whole(tables, segment, 0, 8), _whole(tables, segment, 1, 8)
    if start + length > size or start % _ALIGNED_BYTES:
        raise ValueError(f"a tensor from byte {start} to {start + length} of {size}")
    return start, start + length


def _named(
    tables: memoryview, table: int, extents: list[tuple[int, int]], base: int
) -> tuple[str, StoredData]:
    key, index = text(tables, table, 0, _LONGEST_NAME_BYTES), _whole(tables, table, 1, 4)
    if not key or "\0" in key:
        raise ValueError(f"a tensor of the name {key!r}")
    if index >= len(extents):
        raise ValueError(f"{key!r} lies in segment {index} of {len(extents)}")
    start, stop = extents[index]
    layout = field(tables, table, 2)
    if key.startswith(_TENSOR) != bool(layout):
        raise ValueError(f"{key!r} with{'' if layout else 'out'} a type and sizes")
    if not layout:
        return key, StoredData(base + start, base + stop, None, ())
    kind, sizes = _layout(tables, inner(tables, layout), key)
    if math.prod(sizes) * _BYTES[kind] != stop - start:
        raise ValueError(f"{key!r} of sizes {sizes} in {stop - start} bytes")
    return key, StoredData(base + start, base + stop, kind, sizes)


def _layout(tables: memoryview, layout: int, key: str) -> tuple[int, tuple[int, ...]]:
    """A tensor's type and sizes."""
    kind = _whole(tables, layout, 0, 1)
    if kind not in _BYTES:
        raise ValueError(f"{key!r} of type {kind}")
    sizes, order = _numbers(tables, layout, 1, 4), _numbers(tables, layout, 2, 1)
    if order != tuple(range(len(sizes))):
        raise ValueError(f"{key!r} of sizes {sizes} in the order {order}")
    if max(sizes, default=0) >= 2**31:
        raise ValueError(f"{key!r} of a negative size")
    return kind, sizes


def _numbers(tables: memoryview, table: int, place: int, size: int) -> tuple[int, ...]:
    """A vector of whole numbers."""
    if not (at := field(tables, table, place)):
        raise ValueError("a tensor without sizes or their order")
    start = inner(tables, at)
    if (count := number(tables, start, 4)) > _MOST_DIMENSIONS:
        raise ValueError(f"a tensor of {count} dimensions")
    return tuple(number(tables, start + 4 + size * i, size) for i in range(count))


def _whole(tables: memoryview, table: int, place: int, size: int) -> int:
    """A field that is a whole number, 0 where the table lacks it."""
    at = field(tables, table, place)
    return number(tables, at, size) if at else 0
