"""From an exported step to ExecuTorch programs that share one file of weights.

XNNPACK takes all that grows with the batch (`xnnpack_calls`). It gets each float32 weight as an input and not
as a constant of its own: then forward and backward read one copy, in place, from the mapped file, where a
constant would be packed twice for each. All else runs in ExecuTorch's own kernels.
"""

from __future__ import annotations

import contextlib
import logging
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from torch.export import ExportedProgram
from torch.fx import Node
from torch.utils._sympy.value_ranges import ValueRanges

from fedtt.program_file import PROGRAM_OPERATORS, program_needs

from .compiling import compiling, does_not_compile
from .quantise import Stored
from .trace import decomposed_once

with warnings.catch_warnings():  # importing it says much about torch's and its own deprecations
    warnings.simplefilter("ignore")
    from executorch.exir import EdgeCompileConfig, ExecutorchBackendConfig, to_edge
    from executorch.exir._serialize._cord import Cord
    from executorch.exir._serialize._named_data_store import NamedDataStore
    from executorch.exir._serialize.data_serializer import DataPayload
    from executorch.extension.flat_tensor.serialize.serialize import FlatTensorSerializer

    from .executorch_passes import FROZEN, compute_late, digest, frozen_names, simplify, store
    from .xnnpack_calls import XnnpackCalls

__all__ = ["write_programs"]

_ATEN = torch.ops.aten
_TAG = "weights"
_SMALL = 8  #: rows, or tokens


def write_programs(
    programs: Iterable[tuple[str, ExportedProgram]],
    weights: str,
    directory: Path,
    stored: Mapping[int, Stored] | None = None,
) -> None:
    """Lower each program to the file of its name, and write once, to `weights`, every tensor of all.

    stored: what is kept of a matrix in its place, by its address. Raises ConfigError for a program that
    cannot be lowered, or to an operator that devices refuse.
    """
    data_store, serializer = NamedDataStore(), FlatTensorSerializer()
    with _quiet():
        for name, program in programs:
            with compiling(name, "executorch"):
                code, data = _lower(program, stored or {})
            if foreign := program_needs(code, name).operators - PROGRAM_OPERATORS:
                raise does_not_compile(name, "executorch", f"has {min(foreign)}, which devices do not run")
            (directory / name).write_bytes(code)
            data_store.merge_named_data_store(serializer.deserialize_to_named_data_store_output(data, _TAG))
        merged = data_store.get_named_data_store_output()
        payload = DataPayload(buffers=merged.buffers, named_data=merged.external_data[_TAG])
        (directory / weights).write_bytes(bytes(serializer.serialize(payload)))


def _lower(program: ExportedProgram, stored: Mapping[int, Stored]) -> tuple[bytes, Cord]:
    """The program and its tensors, each named by what it holds, so that other weights are never mistaken."""
    _name_by_content(program)
    simplify(program.graph, frozen_names(program))
    store(program, stored)
    program.graph_module.recompile()
    config = EdgeCompileConfig(_check_ir_validity=False, preserve_ops=[_ATEN.linear.default])
    with decomposed_once(program):
        edge = to_edge(program, compile_config=config)
    with _small(program):
        edge = edge.to_backend(XnnpackCalls(_TAG))
    calls = edge.exported_program()
    compute_late(calls.graph, frozen_names(calls))
    calls.graph_module.recompile()
    lowered = edge.to_executorch(ExecutorchBackendConfig(external_constants=lambda node: _TAG))
    with tempfile.TemporaryDirectory() as directory:
        lowered.write_tensor_data_to_file(directory)
        data = (Path(directory) / f"{_TAG}.ptd").read_bytes()
    return lowered.buffer, Cord(data)


@contextlib.contextmanager
def _small(program: ExportedProgram) -> Iterator[None]:
    """Let all dynamic sizes be small.

    XNNPACK makes resident what it plans when a program is loaded, and adds where a batch needs more.
    """
    values = (node.meta["val"] for node in program.graph.nodes if node.op == "placeholder")
    symbolic = (size for value in values for size in value.shape if isinstance(size, torch.SymInt))
    ranges = next(symbolic).node.shape_env.var_to_range
    before = dict(ranges)
    ranges |= {symbol: ValueRanges(known.lower, max(known.lower, _SMALL)) for symbol, known in before.items()}
    try:
        yield
    finally:
        ranges |= before


def _name_by_content(program: ExportedProgram) -> None:
    """Give each constant the name of its bytes, and let equal ones be one."""
    nodes = {node.name: node for node in program.graph.nodes if node.op == "placeholder"}
    first: dict[str, Node] = {}
    for spec in program.graph_signature.input_specs:
        if spec.kind not in FROZEN or spec.target is None:
            continue
        held = program.state_dict if spec.target in program.state_dict else program.constants
        value = held.pop(spec.target)
        name, node = digest(value), nodes[spec.arg.name]
        if name in first:
            node.replace_all_uses_with(first[name])
            name = f"{name}_{len(first)}_{node.name}"
        else:
            first[name] = node
        held[name] = value
        spec.target = name


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence what lowering says about its own deprecations and the passes it takes."""
    level = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
