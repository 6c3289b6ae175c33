"""ExecuTorch programs with nothing in them but what `fedtt.program_file` reads, and another reader of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from flatbuffers import Builder  # type: ignore[import-untyped]
from flatbuffers.table import Table  # type: ignore[import-untyped]

from fedtt.program_file import ProgramNeeds

__all__ = ["DELEGATE", "JUMP", "KERNEL", "MOVE", "names_in", "program_bytes", "sound_programs", "with_header"]

KERNEL, DELEGATE, MOVE, JUMP = 1, 2, 3, 4  #: kinds of instructions
_HEADER_BYTES = 32  #: as ExecuTorch puts it behind the identifier


def sound_programs() -> tuple[bytes, ...]:
    """Without a header, and with one and data behind the program."""
    plain = program_bytes([("aten::add", "out"), ("aten::sym_numel", "")])
    return plain, with_header(plain) + bytes(8)


def program_bytes(
    operators: Sequence[tuple[str, str]],
    back_ends: Sequence[str] = ("XnnpackBackend",),
    instructions: Sequence[int] = (KERNEL, DELEGATE),
    plans: int = 1,
) -> bytes:
    """A program of one method, or of `plans` times the same."""
    to = Builder()

    def table(places: int, **fields: int) -> int:
        """fields: f0, f1, … by their places in program.fbs."""
        to.StartObject(places)
        for place, value in fields.items():
            to.PrependUOffsetTRelativeSlot(int(place[1:]), value, 0)
        return int(to.EndObject())

    def vector(tables: Sequence[int]) -> int:
        to.StartVector(4, len(tables), 4)
        for each in reversed(tables):
            to.PrependUOffsetTRelative(each)
        return int(to.EndVector())

    def instruction(kind: int) -> int:
        call = table(2)
        to.StartObject(2)
        to.PrependUint8Slot(0, kind, 0)
        to.PrependUOffsetTRelativeSlot(1, call, 0)
        return int(to.EndObject())

    named = [table(2, f0=to.CreateString(name), f1=to.CreateString(overload)) for name, overload in operators]
    delegates = [table(3, f0=to.CreateString(name)) for name in back_ends]
    chain = table(4, f2=vector([instruction(kind) for kind in instructions]))
    plan = table(10, f5=vector([chain]), f6=vector(named), f7=vector(delegates))
    to.Finish(table(8, f1=vector([plan] * plans)), file_identifier=b"ET12")
    return bytes(to.Output())


def with_header(program: bytes) -> bytes:
    """The same with ExecuTorch's header, which says where it ends."""
    root = int.from_bytes(program[:4], "little") + _HEADER_BYTES
    size = len(program) + _HEADER_BYTES
    header = b"eh00" + _HEADER_BYTES.to_bytes(4, "little") + size.to_bytes(8, "little") + bytes(16)
    return root.to_bytes(4, "little") + program[4:8] + header + program[8:]


def names_in(program: bytes) -> ProgramNeeds:
    """Operators and back ends, as the package `flatbuffers` reads them."""
    operators, back_ends = set[str](), set[str]()
    for plan in _vector(Table(program, int.from_bytes(program[:4], "little")), 1):
        for found in _vector(plan, 6):
            name, overload = _text(found, 0), _text(found, 1)
            operators.add(f"{name}.{overload}" if overload else name)
        back_ends |= {_text(found, 0) for found in _vector(plan, 7)}
    return ProgramNeeds(frozenset(operators), frozenset(back_ends))


def _vector(table: Table, place: int) -> Iterator[Table]:
    if offset := table.Offset(4 + 2 * place):
        first = table.Vector(offset)
        for entry in range(table.VectorLen(offset)):
            yield Table(table.Bytes, table.Indirect(first + 4 * entry))


def _text(table: Table, place: int) -> str:
    offset = table.Offset(4 + 2 * place)
    return table.String(table.Pos + offset).decode() if offset else ""
