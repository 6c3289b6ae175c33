"""What an ExecuTorch program asks of whoever loads it, read before a runtime sees it: its operators.

The few tables of ExecuTorch's program.fbs that lead to an operator, a back end or an instruction; nothing
else is read.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final, NamedTuple

from fedtt.errors import BundleError
from fedtt.flat_buffer import field, inner, number, text, vector
from fedtt.graph_file import check_size

__all__ = ["BACK_ENDS", "PROGRAM_OPERATORS", "ProgramNeeds", "check_program", "program_needs"]

_MOST_TABLES = 20_000  #: counted each time that one is named; ours have up to 1,500
_MOST_KINDS = 1000  #: of operators and back ends together
_LONGEST_NAME_BYTES = 200
_IDENTIFIER, _HEADER = b"ET12", b"eh00"
_CALLS = (1, 2)  #: of an operator and of a back end; others jump, so that a program need not end

#: table -> the fields of it that matter, each a vector of tables.
_WITHIN: Final[dict[str, dict[int, str]]] = {
    "program": {1: "plan"},
    "plan": {5: "chain", 6: "operator", 7: "back end"},
    "chain": {2: "instruction"},
}

_ATEN = """
    _log_softmax.out _softmax.out _to_copy.out abs.out add.Scalar_out add.out addmm.out amax.out amin.out
    any.all_out any.dims_out any.out arange.out arange.start_out argmax.out argmin.out bitwise_and.Scalar_out
    bitwise_and.Tensor_out bitwise_not.out bitwise_or.Scalar_out bitwise_or.Tensor_out bmm.out cat.out
    ceil.out clamp.Tensor_out clamp.out clone.out constant_pad_nd.out copy.out cos.out cumsum.out
    div.Scalar_mode_out div.Scalar_out div.out div.out_mode embedding.out eq.Scalar_out eq.Tensor_out erf.out
    exp.out expand_copy.out expm1.out fill.Scalar_out fill.Tensor_out floor.out floor_divide.out full.out
    full_like.out gather.out ge.Scalar_out ge.Tensor_out gelu.out gt.Scalar_out gt.Tensor_out index.Tensor_out
    index_put.out index_select.out isinf.out isnan.out le.Scalar_out le.Tensor_out linear.out log.out
    log1p.out logical_and.out logical_not.out logical_or.out logical_xor.out lt.Scalar_out lt.Tensor_out
    masked_fill.Scalar_out max.dim_max max.unary_out maximum.out mean.dtype_out mean.out min.dim_min
    min.unary_out minimum.out mm.out mul.Scalar_out mul.out native_layer_norm.out ne.Scalar_out ne.Tensor_out
    neg.out ones.out permute_copy.out pow.Scalar_out pow.Tensor_Scalar_out pow.Tensor_Tensor_out prod.int_out
    prod.out reciprocal.out relu.out remainder.Scalar_out remainder.Tensor_out repeat.out round.out rsqrt.out
    rsub.Scalar_out scalar_tensor.out scatter.src_out scatter.value_out scatter_add.out select_copy.int_out
    select_scatter.out sigmoid.out sign.out sin.out slice_copy.Tensor_out slice_scatter.out
    split_copy.Tensor_out split_with_sizes_copy.out sqrt.out squeeze_copy.dim_out squeeze_copy.dims_out
    stack.out sub.Scalar_out sub.out sum.IntList_out sym_numel sym_size.int t_copy.out tanh.out
    transpose_copy.int_out tril.out trunc.out unbind_copy.int_out unsqueeze_copy.out var.correction_out
    var.out var_mean.correction_out view_copy.out where.self_out zeros.out
"""
_PRIM = """
    add.Scalar ceil.Scalar eq.Scalar et_view.default floordiv.Scalar floordiv.int ge.Scalar gt.Scalar
    le.Scalar lt.Scalar mod.Scalar mod.int mul.Scalar neg.Scalar round.Scalar sub.Scalar sym_float.Scalar
    sym_int.Scalar sym_ite.Scalar sym_max.Scalar sym_min.Scalar sym_not.Scalar truediv.Scalar trunc.Scalar
"""
#: That export makes, and their like: functions of their inputs alone.
PROGRAM_OPERATORS: Final = frozenset(
    [f"aten::{name}" for name in _ATEN.split()]
    + [f"executorch_prim::{name}" for name in _PRIM.split()]
    + [f"dim_order_ops::{name}.out" for name in ("_clone_dim_order", "_to_dim_order_copy")]
)
BACK_ENDS: Final = frozenset({"XnnpackBackend"})


class ProgramNeeds(NamedTuple):
    """What a program asks for."""

    operators: frozenset[str]  #: as the runtime knows them, "aten::add.out"
    back_ends: frozenset[str]  #: that compute parts of it


def check_program(data: bytes, name: str) -> None:
    """Raise BundleError where a program needs more than our operators and back end."""
    needs = program_needs(data, name)
    for kind, foreign in (
        ("operator", needs.operators - PROGRAM_OPERATORS),
        ("back end", needs.back_ends - BACK_ENDS),
    ):
        if foreign:
            raise BundleError(
                f"{name} uses the {kind} {min(foreign)!r}, which no program of fedtt does: not loaded; "
                "bring this client up to date, or export the bundle again"
            )


def program_needs(data: bytes, name: str) -> ProgramNeeds:
    """Read a program's needs; raises BundleError where it is none of ours.

    Looks at 20,000 parts at most, and takes 2 MiB of memory at most.
    """
    check_size(len(data), name)
    operators, back_ends = set[str](), set[str]()
    try:
        program = _program(memoryview(data))
        for count, (kind, at) in enumerate(_tables(program, "program", inner(program, 0))):
            if count == _MOST_TABLES:
                raise ValueError(f"more than {_MOST_TABLES} parts")
            if len(operators) + len(back_ends) > _MOST_KINDS:
                raise ValueError(f"more than {_MOST_KINDS} operators")
            if kind == "operator":
                name_of, overload = (text(program, at, place, _LONGEST_NAME_BYTES) for place in (0, 1))
                operators.add(f"{name_of}.{overload}" if overload else name_of)
            elif kind == "back end":
                back_ends.add(text(program, at, 0, _LONGEST_NAME_BYTES))
            elif kind == "instruction" and (found := _kind(program, at)) not in _CALLS:
                raise ValueError(f"an instruction of kind {found}, which is no call")
    except ValueError as error:
        raise BundleError(
            f"{name} cannot be loaded: it is no program of fedtt ({error}); download the bundle again"
        ) from None
    return ProgramNeeds(frozenset(operators), frozenset(back_ends))


def _program(data: memoryview) -> memoryview:
    """The program itself: its header says where it ends and data of other kinds begin."""
    if data[4:8] != _IDENTIFIER:
        raise ValueError(f"it does not begin as {_IDENTIFIER.decode()} does")
    if data[8:12] != _HEADER:
        return data
    size = number(data, 16, 8)
    if size > len(data):
        raise ValueError(f"a program of {size} bytes where {len(data)} are")
    return data[:size]


def _tables(data: memoryview, kind: str, at: int) -> Iterator[tuple[str, int]]:
    """A table and those within it, as far as they matter."""
    yield kind, at
    for place, within in _WITHIN.get(kind, {}).items():
        for entry in vector(data, at, place) or ():
            yield from _tables(data, within, inner(data, entry))


def _kind(data: memoryview, instruction: int) -> int:
    at = field(data, instruction, 0)
    return number(data, at, 1) if at else 0
