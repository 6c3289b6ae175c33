"""FlatBuffers' layout (flatbuffers.dev/internals): a table by where it begins, its fields by their places.

All is looked up as a runtime does, so that both see the same, and nowhere outside the bytes that are given:
each raises ValueError for what is not there.
"""

from __future__ import annotations

__all__ = ["field", "inner", "number", "text", "vector"]


def vector(data: memoryview, table: int, place: int) -> range | None:
    """Where the offsets to the tables of a vector lie, None where the table lacks it."""
    if not (at := field(data, table, place)):
        return None
    start = inner(data, at)
    return range(start + 4, start + 4 + 4 * number(data, start, 4), 4)


def text(data: memoryview, table: int, place: int, longest_bytes: int) -> str:
    """Of a field; "" where the table lacks it. It ends with a zero, as runtimes read up to that."""
    if not (at := field(data, table, place)):
        return ""
    start = inner(data, at)
    size = number(data, start, 4)
    if size > longest_bytes:
        raise ValueError(f"a name of {size} bytes")
    if number(data, start + 4 + size, 1):
        raise ValueError("a name that does not end")
    return str(data[start + 4 : start + 4 + size], "utf-8")


def field(data: memoryview, table: int, place: int) -> int:
    """Where a field of a table lies, 0 where the table lacks it."""
    places = table - number(data, table, 4, signed=True)
    slot = 4 + 2 * place
    offset = number(data, places + slot, 2) if slot < number(data, places, 2) else 0
    return table + offset if offset else 0


def inner(data: memoryview, at: int) -> int:
    """Where the offset at this place leads."""
    return at + number(data, at, 4)


def number(data: memoryview, at: int, size: int, *, signed: bool = False) -> int:
    """The whole number at this place; ValueError where it is not all within the bytes."""
    if not 0 <= at <= len(data) - size:
        raise ValueError(f"it refers to byte {at} of its {len(data)}")
    return int.from_bytes(data[at : at + size], "little", signed=signed)
