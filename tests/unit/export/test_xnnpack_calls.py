"""What shares a call of XNNPACK, on graphs whose nodes are only names."""

from __future__ import annotations

import pytest
from torch.fx import Graph, Node

pytest.importorskip("executorch.exir", reason="SKIPPED: executorch is not installed, nothing is lowered")

from export.xnnpack_calls import _joined


def graph(**reads: str) -> dict[str, Node]:
    """Nodes by name, each with the letters of those that it reads."""
    nodes: dict[str, Node] = {}
    made = Graph()
    for name, sources in reads.items():
        nodes[name] = made.call_function(print, tuple(nodes[source] for source in sources), name=name)
    return nodes


def calls(nodes: dict[str, Node], left_out: str = "") -> set[str]:
    groups = _joined(nodes.values(), [{node} for name, node in nodes.items() if name not in left_out])
    return {"".join(sorted(node.name for node in group)) for group in groups}


def test_neighbours_share_a_call_and_strangers_do_not() -> None:
    assert calls(graph(a="", b="a", c="b", d="", e="d")) == {"abc", "de"}


def test_what_needs_something_from_outside_that_needs_the_call_is_a_call_of_its_own() -> None:
    nodes = graph(a="", b="a", c="ab")
    assert calls(nodes) == {"abc"}
    assert calls(nodes, left_out="b") == {"a", "c"}


def test_no_two_calls_wait_for_each_other() -> None:
    """k and g are one call, as n reads both; p reads k, but also what comes of g by way of x."""
    nodes = graph(k="", g="", x="g", m="x", n="gk", p="km")
    assert calls(nodes, left_out="x") == {"gkn", "mp"}
