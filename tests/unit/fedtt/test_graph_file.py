"""What a graph may ask for: our operators, and the files of weights that its manifest names."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedtt.errors import BundleError
from fedtt.graph_file import GRAPH_LIMIT_BYTES, GraphNeeds, check_graph, graph_needs

WEIGHTS = ("base.bin",)
Change = Callable[[onnx.ModelProto], object]


def tensor_elsewhere(location: str) -> onnx.TensorProto:
    tensor = onnx.TensorProto(name="w", data_type=1, dims=[4], data_location=onnx.TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value=location)
    return tensor


def nested(operator: str) -> onnx.GraphProto:
    return onnx.GraphProto(name="inner", node=[onnx.NodeProto(op_type=operator, output=["y"])])


def add(operator: str = "Add", domain: str = "", **attributes: Any) -> Change:
    """One more node."""
    node = onnx.helper.make_node(operator, [], ["y"], domain=domain, **attributes)
    return lambda model: model.graph.node.append(node)


def test_exported_graphs_need_our_operators_and_their_weights_alone(tiny_bundle: Path) -> None:
    for name in ("step.onnx", "eval.onnx"):
        data = (tiny_bundle / name).read_bytes()
        check_graph(data, name, WEIGHTS)
        nodes = onnx.load(tiny_bundle / name, load_external_data=False).graph.node
        assert graph_needs(data, name) == GraphNeeds(
            frozenset((node.domain, node.op_type) for node in nodes), frozenset(WEIGHTS)
        )


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda m: setattr(m.graph.node[3], "op_type", "RandomNormalLike"), "operator 'RandomNormalLike'"),
        (lambda m: setattr(m.graph.node[3], "domain", "evil"), "operator 'evil."),
        (add("Gelu", domain="com.microsoft"), "operator 'com.microsoft.Gelu'"),
        (add(body=nested("Loop")), "operator 'Loop'"),
        (add(branches=[nested("Add"), nested("If")]), "operator 'If'"),
        (lambda m: m.functions.add(name="Add"), "functions"),
        (lambda m: m.training_info.add(), "functions or training"),
        *(
            (lambda m, to=to: m.graph.initializer.append(tensor_elsewhere(to)), f"reads {to!r}")
            for to in ("../secret", "/etc/hostname", "manifest.json", "./base.bin", "")
        ),
        (add(value=tensor_elsewhere("a")), "reads 'a'"),
        (add(values=[tensor_elsewhere("b")]), "reads 'b'"),
        (add(s=onnx.SparseTensorProto(values=tensor_elsewhere("c"))), "reads 'c'"),
        (
            lambda m: m.graph.sparse_initializer.add(indices=tensor_elsewhere("d")),
            "reads 'd'",
        ),
    ],
)
def test_what_asks_for_more_is_refused(tiny_bundle: Path, change: Change, complaint: str) -> None:
    model = onnx.load(tiny_bundle / "step.onnx", load_external_data=False)
    change(model)
    with pytest.raises(BundleError) as error:
        check_graph(model.SerializeToString(), "step.onnx", WEIGHTS)
    assert complaint in str(error.value)


def test_a_field_that_comes_twice_hides_nothing() -> None:
    def node(*operators: bytes) -> bytes:
        fields = b"".join(bytes([4 << 3 | 2, len(name)]) + name for name in operators)
        graph = bytes([1 << 3 | 2, len(fields)]) + fields
        return bytes([7 << 3 | 2, len(graph)]) + graph

    check_graph(node(b"Add") + node(b"Mul"), "twice", ())
    with pytest.raises(BundleError, match="'Loop'"):
        check_graph(node(b"Loop") + node(b"Add"), "twice", ())
    for operators in ((b"Add", b"Loop"), (b"Loop", b"Add"), (b"Add", b"Add")):
        with pytest.raises(BundleError, match="a message with two operators"):
            check_graph(node(*operators) + node(b"Add"), "twice", ())


@given(
    st.binary(max_size=60)
    | st.lists(st.sampled_from(b"\x3a\x0a\x22\x2a\x01\x02\x80"), max_size=40).map(bytes)
)
def test_any_bytes_are_read_or_refused(data: bytes) -> None:
    with contextlib.suppress(BundleError):
        assert isinstance(graph_needs(data, "any"), GraphNeeds)


def test_a_file_too_large_for_a_graph_is_refused() -> None:
    with pytest.raises(BundleError, match="at most 67108864"):  # 2**26
        graph_needs(bytes(GRAPH_LIMIT_BYTES + 1), "large")
