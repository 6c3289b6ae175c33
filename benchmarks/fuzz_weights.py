"""ExecuTorch files of weights as `fedtt.weights_file` reads them, and another reader of their tables."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import NamedTuple

from flatbuffers import Builder  # type: ignore[import-untyped]
from flatbuffers.table import Table  # type: ignore[import-untyped]

from fedtt.weights_file import StoredData

__all__ = ["FLOAT32", "INT64", "Named", "data_in", "sound_weights", "weights_bytes"]

FLOAT32, INT64 = 6, 4  #: ExecuTorch's types
_HEADER_BYTES, _ALIGNED_BYTES = 48, 128


class Named(NamedTuple):
    """One entry of the tables; a layout, its sizes or their order may be left out."""

    key: str | None = "t0"
    segment: int = 0
    type: int | None = FLOAT32  #: None without a layout
    sizes: Sequence[int] | None = (2, 3)
    order: Sequence[int] | None = (0, 1)


def sound_weights() -> tuple[bytes, ...]:
    """A tensor, and tensors of two types that share a segment beside data of another kind."""
    many = [Named(), Named("t1"), Named("5c1e", 1, None), Named("t2", 2, INT64, (), ())]
    return weights_bytes([Named()], [24]), weights_bytes(many, [24, 5, 8])


def weights_bytes(
    named: Sequence[Named],
    lengths: Sequence[int],
    *,
    version: int = 0,
    starts: Sequence[int] | None = None,
    **header: int,
) -> bytes:
    """A file whose segments have these lengths; `starts` in place of their own, and of the header other
    `length`, `tables_start`, `tables_bytes`, `base` or `data_bytes`."""
    ends = accumulate(-(-length // _ALIGNED_BYTES) * _ALIGNED_BYTES for length in lengths)
    placed = [0, *ends][:-1]
    data = b"".join(bytes(start - end) for start, end in _gaps(placed, lengths))
    tables = _tables(named, list(zip(starts or placed, lengths, strict=True)), version)
    base = -(-(len(tables) + _HEADER_BYTES) // _ALIGNED_BYTES) * _ALIGNED_BYTES
    values = {"length": 40, "tables_start": _HEADER_BYTES, "tables_bytes": len(tables), "base": base}
    values |= {"data_bytes": len(data)} | header
    packed = b"FH01" + values.pop("length").to_bytes(4, "little")
    packed += b"".join(value.to_bytes(8, "little") for value in values.values())
    root = int.from_bytes(tables[:4], "little") + _HEADER_BYTES
    head = root.to_bytes(4, "little") + tables[4:8] + packed.ljust(_HEADER_BYTES, b"\0") + tables[8:]
    return head.ljust(base, b"\0") + data


def _gaps(starts: Sequence[int], lengths: Sequence[int]) -> Iterator[tuple[int, int]]:
    """The end of each segment and that of the one before."""
    ends = [start + length for start, length in zip(starts, lengths, strict=True)]
    return zip(ends, [0, *ends], strict=False)


def _tables(named: Sequence[Named], segments: Sequence[tuple[int, int]], version: int) -> bytes:
    to = Builder()

    def vector(tables: Sequence[int]) -> int:
        to.StartVector(4, len(tables), 4)
        for each in reversed(tables):
            to.PrependUOffsetTRelative(each)
        return int(to.EndVector())

    def segment(start: int, length: int) -> int:
        to.StartObject(2)
        to.PrependUint64Slot(0, start, 0)
        to.PrependUint64Slot(1, length, 0)
        return int(to.EndObject())

    def numbers(values: Sequence[int] | None, size: int) -> int:
        if values is None:
            return 0
        to.StartVector(size, len(values), size)
        for value in reversed(values):
            (to.PrependInt32 if size == 4 else to.PrependUint8)(value)
        return int(to.EndVector())

    def entry(each: Named) -> int:
        key = 0 if each.key is None else to.CreateString(each.key)
        layout = 0
        if each.type is not None:
            sizes, order = numbers(each.sizes, 4), numbers(each.order, 1)
            to.StartObject(3)
            to.PrependInt8Slot(0, each.type, 0)
            to.PrependUOffsetTRelativeSlot(1, sizes, 0)
            to.PrependUOffsetTRelativeSlot(2, order, 0)
            layout = int(to.EndObject())
        to.StartObject(3)
        to.PrependUOffsetTRelativeSlot(0, key, 0)
        to.PrependUint32Slot(1, each.segment, 0)
        to.PrependUOffsetTRelativeSlot(2, layout, 0)
        return int(to.EndObject())

    placed = vector([segment(*each) for each in segments])
    names = vector([entry(each) for each in named])
    to.StartObject(3)
    to.PrependUint32Slot(0, version, 0)
    to.PrependUOffsetTRelativeSlot(1, placed, 0)
    to.PrependUOffsetTRelativeSlot(2, names, 0)
    to.Finish(int(to.EndObject()), file_identifier=b"FT01")
    return bytes(to.Output())


def data_in(weights: bytes) -> dict[str, StoredData]:
    """The same as `stored_data`, as the package `flatbuffers` reads it."""
    root = Table(weights, int.from_bytes(weights[:4], "little"))
    base = int.from_bytes(weights[32:40], "little")
    segments = list(_vector(root, 1))
    found = {}
    for entry in _vector(root, 2):
        segment = segments[_whole(entry, 1, 4)]
        start = base + _whole(segment, 0, 8)
        kind: int | None = None
        sizes: tuple[int, ...] = ()
        if offset := entry.Offset(8):
            layout = Table(entry.Bytes, entry.Indirect(entry.Pos + offset))
            kind, sizes = _whole(layout, 0, 1), _sizes(layout)
        key = entry.String(entry.Pos + entry.Offset(4)).decode()
        found[key] = StoredData(start, start + _whole(segment, 1, 8), kind, sizes)
    return found


def _vector(table: Table, place: int) -> Iterator[Table]:
    if offset := table.Offset(4 + 2 * place):
        first = table.Vector(offset)
        for entry in range(table.VectorLen(offset)):
            yield Table(table.Bytes, table.Indirect(first + 4 * entry))


def _sizes(layout: Table) -> tuple[int, ...]:
    offset = layout.Offset(6)
    first, count = layout.Vector(offset), layout.VectorLen(offset)
    data = layout.Bytes
    return tuple(int.from_bytes(data[at : at + 4], "little") for at in range(first, first + 4 * count, 4))


def _whole(table: Table, place: int, size: int) -> int:
    offset = table.Offset(4 + 2 * place)
    at = table.Pos + offset
    return int.from_bytes(table.Bytes[at : at + size], "little") if offset else 0
