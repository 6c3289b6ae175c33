"""What an ONNX file asks of whoever loads it, read before a runtime sees it: operators, and files of weights.

Protobuf's wire format (protobuf.dev/programming-guides/encoding) and the few messages of onnx.proto3 that
lead to a node or to external data; everything else is stepped over. A text that comes twice in one message
is refused, for parsers may take either.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Final, NamedTuple

from fedtt.errors import BundleError

__all__ = ["GRAPH_LIMIT_BYTES", "OPERATORS", "GraphNeeds", "check_graph", "check_size", "graph_needs"]

GRAPH_LIMIT_BYTES = 64 << 20  #: of a file without its weights; ours have up to 34 MB
_DEEPEST = 100  #: messages within each other, as in protobuf's own parsers; ours have 5
_MOST_KINDS = 1000  #: of operators, and of files

_STANDARD = """
    Abs Add And Cast CastLike Ceil Clip Concat Constant ConstantOfShape Cos CumSum DequantizeLinear Div
    DynamicQuantizeLinear Einsum Equal Erf Exp Expand Flatten Floor Gather GatherElements GatherND Gelu Gemm
    Greater GreaterOrEqual HardSigmoid Identity IsInf IsNaN LayerNormalization Less LessOrEqual Log LogSoftmax
    MatMul MatMulInteger Max Min Mod Mul Neg Not Or Pow QuantizeLinear Range Reciprocal ReduceL2 ReduceMax
    ReduceMean ReduceMin ReduceProd ReduceSum Relu Reshape Round ScatterElements ScatterND Shape Sigmoid Sign
    Sin Slice Softmax Softplus Split Sqrt Squeeze Sub Sum Tanh Tile Transpose Trilu Unsqueeze Where
"""
#: (domain, operator) that export makes, and their like: functions of their inputs alone, without graphs.
OPERATORS: Final = frozenset(("", name) for name in _STANDARD.split()) | {
    ("com.microsoft", "MatMulIntegerToFloat")
}

#: message -> its fields that matter: a message to enter, or the text to keep.
_MESSAGES: Final[dict[str, dict[int, str]]] = {
    "model": {7: "graph", 20: "code", 25: "code"},  # 20 is training_info, 25 functions: none of ours has any
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "node": {4: "operator", 5: "attribute", 7: "domain"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
    "tensor": {13: "external"},
    "external": {1: "key", 2: "value"},
}


class GraphNeeds(NamedTuple):
    """What a graph asks for."""

    operators: frozenset[tuple[str, str]]  #: (domain, operator), those of nested graphs with them
    files: frozenset[str]  #: that hold tensors


def check_size(size_bytes: int, name: str) -> None:
    """Raise BundleError for more than a graph has: before it is read, where it lies in a file."""
    if size_bytes > GRAPH_LIMIT_BYTES:
        raise BundleError(f"{name} has {size_bytes} bytes, a graph has at most {GRAPH_LIMIT_BYTES}")


def check_graph(data: bytes, name: str, weights: Collection[str]) -> None:
    """Raise BundleError where a graph needs more than our operators and these files of weights."""
    needs = graph_needs(data, name)
    if foreign := needs.operators - OPERATORS:
        domain, operator = min(foreign)
        shown = f"{domain}.{operator}" if domain else operator
        raise BundleError(
            f"{name} uses the operator {shown[:100]!r}, which no graph of fedtt does: not loaded"
        )
    if outside := needs.files - set(weights):
        raise BundleError(f"{name} reads {min(outside)[:100]!r}, which is no file of its weights: not loaded")


def graph_needs(data: bytes, name: str) -> GraphNeeds:
    """Read a graph's needs; raises BundleError where it is none of ours.

    Takes time linear in its bytes, and memory of at most six times its bytes and 1 MiB.
    """
    check_size(len(data), name)
    operators, files = set[tuple[str, str]](), set[str]()
    try:
        for kind, texts in _read("model", memoryview(data), 0):
            if kind == "node":
                operators.add((texts.get("domain", ""), texts.get("operator", "")))
            elif texts.get("key") == "location":
                files.add(texts.get("value", ""))
            if max(len(operators), len(files)) > _MOST_KINDS:
                raise ValueError(f"more than {_MOST_KINDS} operators or files")
    except ValueError as error:
        raise BundleError(f"{name} cannot be loaded: it is no graph of fedtt ({error})") from None
    return GraphNeeds(frozenset(operators), frozenset(files))


def _read(kind: str, message: memoryview, depth: int) -> Iterator[tuple[str, dict[str, str]]]:
    """Messages with their texts, as far as they matter, what is within one before it; raises ValueError."""
    if depth > _DEEPEST:
        raise ValueError(f"more than {_DEEPEST} messages within each other")
    texts: dict[str, str] = {}
    for number, value in _fields(message):
        field = _MESSAGES[kind].get(number)
        if field is not None and field in _MESSAGES:
            yield from _read(field, value, depth + 1)
        elif field == "code":
            raise ValueError("it brings functions or training of its own")
        elif field in texts:
            raise ValueError(f"a message with two {field}s")
        elif field:
            texts[field] = str(value, "utf-8")
    yield kind, texts


def _fields(message: memoryview) -> Iterator[tuple[int, memoryview]]:
    """The fields of a message that hold bytes: number and contents. Raises ValueError for what is none."""
    at, end = 0, len(message)
    while at < end:
        tag, at = _varint(message, at)
        if tag >= 2**32:  # parsers cut it to 32 bits, and would see another field
            raise ValueError("a field of too large a number")
        match tag & 7:
            case 0:
                _, at = _varint(message, at)
            case 1:
                at += 8
            case 2:
                size, at = _varint(message, at)
                if size > end - at:
                    raise ValueError(f"a field of {size} bytes where {end - at} are left")
                yield tag >> 3, message[at : at + size]
                at += size
            case 5:
                at += 4
            case other:
                raise ValueError(f"a field of wire type {other}")
    if at > end:
        raise ValueError("it ends within a number")


def _varint(message: memoryview, at: int) -> tuple[int, int]:
    """A number of at most ten bytes, and where the next begins."""
    value = 0
    for k, byte in enumerate(message[at : at + 10]):
        value |= (byte & 127) << 7 * k
        if byte < 128:
            return value, at + k + 1
    raise ValueError("a number that does not end")
