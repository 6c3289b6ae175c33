"""In which order a lowered step computes, on graphs whose nodes are only names."""

from __future__ import annotations

import pytest
from torch.fx import Graph, Node

pytest.importorskip("executorch.exir", reason="SKIPPED: executorch is not installed, nothing is lowered")

from export.executorch_passes import compute_late


def test_what_is_computed_of_constants_alone_comes_right_before_the_first_that_reads_it() -> None:
    graph, nodes = Graph(), dict[str, Node]()
    for name in "wx":
        nodes[name] = graph.placeholder(name)
    for name, sources in {"a": "w", "b": "aw", "c": "w", "d": "", "y": "x", "z": "yb", "q": "zcdb"}.items():
        nodes[name] = graph.call_function(print, tuple(nodes[source] for source in sources), name=name)
    graph.output(nodes["q"])
    compute_late(graph, {"w"})
    graph.lint()
    assert "".join(node.name for node in graph.nodes) == "wxyabzdcqoutput"
