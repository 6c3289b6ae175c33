"""What an ExecuTorch program may ask for: our operators, our back end, and an end."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.fuzz_programs import JUMP, KERNEL, MOVE, names_in, program_bytes, sound_programs, with_header
from fedtt.errors import BundleError
from fedtt.graph_file import GRAPH_LIMIT_BYTES
from fedtt.program_file import ProgramNeeds, check_program, program_needs

ADD = ("aten::add", "out")
SOUND = sound_programs()


@pytest.mark.parametrize("program", SOUND, ids=["plain", "with-a-header"])
def test_operators_and_back_ends_are_named_as_the_runtime_knows_them(program: bytes) -> None:
    check_program(program, "step.pte")
    expected = ProgramNeeds(frozenset({"aten::add.out", "aten::sym_numel"}), frozenset({"XnnpackBackend"}))
    assert program_needs(program, "step.pte") == expected == names_in(program)


@pytest.mark.parametrize(
    ("program", "complaint"),
    [
        (program_bytes([ADD, ("aten::rand", "out")]), "uses the operator 'aten::rand.out'"),
        (program_bytes([ADD, ("aten::add.out", "out")]), "uses the operator 'aten::add.out.out'"),
        (program_bytes([ADD, ("evil::add", "out")]), "uses the operator 'evil::add.out'"),
        (program_bytes([("aten::add\0", "out")]), r"uses the operator 'aten::add\\x00.out'"),
        (program_bytes([ADD], ["XnnpackBackend", "VulkanBackend"]), "uses the back end 'VulkanBackend'"),
        (program_bytes([ADD], [""]), "uses the back end ''"),
        (program_bytes([ADD], instructions=[KERNEL, JUMP]), "an instruction of kind 4, which is no call"),
        (program_bytes([ADD], instructions=[MOVE]), "an instruction of kind 3, which is no call"),
        (program_bytes([ADD], instructions=[0]), "an instruction of kind 0, which is no call"),
    ],
)
def test_what_asks_for_more_is_refused(program: bytes, complaint: str) -> None:
    for data in (program, with_header(program)):
        with pytest.raises(BundleError, match=f"^step.pte .*{complaint}.* the bundle again$"):
            check_program(data, "step.pte")


def test_a_second_method_hides_nothing() -> None:
    """All are read, though devices run `forward` alone."""
    with pytest.raises(BundleError, match="evil"):
        check_program(program_bytes([ADD, ("evil::add", "out")], plans=3), "step.pte")


def test_a_name_without_its_zero_is_refused() -> None:
    """The runtime reads on up to a zero, and would see another."""
    plain = SOUND[0]
    end = plain.index(b"aten::add\0") + len(b"aten::add")
    with pytest.raises(BundleError, match="a name that does not end"):
        program_needs(plain[:end] + b"!" + plain[end + 1 :], "step.pte")


def test_what_lies_behind_the_program_is_none_of_it() -> None:
    """The header bounds it for the runtime, and so here."""
    plain, whole = SOUND
    assert len(whole) == len(plain) + 32 + 8
    longer = whole[:16] + (len(whole) + 1).to_bytes(8, "little") + whole[24:]
    with pytest.raises(BundleError, match=f"a program of {len(whole) + 1} bytes where {len(whole)} are"):
        program_needs(longer, "step.pte")
    shorter = whole[:16] + (60).to_bytes(8, "little") + whole[24:]
    with pytest.raises(BundleError, match="of its 60"):
        program_needs(shorter, "step.pte")


def test_a_file_of_another_kind_is_refused() -> None:
    for data in (b"", b"not a program", SOUND[0].replace(b"ET12", b"ET13"), b"\0" * 100):
        with pytest.raises(BundleError, match=r"step\.pte cannot be loaded: it is no program of fedtt"):
            program_needs(data, "step.pte")


def test_a_file_too_large_is_refused() -> None:
    with pytest.raises(BundleError, match="at most 67108864"):  # 2**26
        program_needs(bytes(GRAPH_LIMIT_BYTES + 1), "large")


@pytest.mark.parametrize("program", SOUND, ids=["plain", "with-a-header"])
def test_a_part_of_a_program_is_read_or_refused(program: bytes) -> None:
    found = 0
    for size in range(len(program)):
        with contextlib.suppress(BundleError):
            assert program_needs(program[:size], "cut") == program_needs(program, "whole")
            found += 1
    assert found <= 11  # what follows the last name's zero: padding, or data behind the program


@given(st.binary(max_size=60) | st.binary(max_size=60).map(lambda data: data[:4] + b"ET12" + data[8:]))
def test_any_bytes_are_read_or_refused(data: bytes) -> None:
    with contextlib.suppress(BundleError):
        assert program_needs(data, "any") == names_in(data)


@given(st.sampled_from(SOUND), st.data())
def test_a_changed_program_is_read_as_flatbuffers_reads_it_or_refused(
    program: bytes, data: st.DataObject
) -> None:
    changed = bytearray(program)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(changed) - 4))
        value = data.draw(st.integers(0, 300) | st.integers(0, 2**32 - 1))
        changed[at : at + 4] = value.to_bytes(4, "little")
    with contextlib.suppress(BundleError):
        assert program_needs(bytes(changed), "any") == names_in(bytes(changed))
