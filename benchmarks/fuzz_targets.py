"""What `benchmarks.fuzz` throws bytes at: every decoder of foreign bytes, with sound inputs to begin with.

A target returns for bytes that its decoder takes and raises one of `REFUSALS` for those that it refuses;
anything else is a finding, an assertion about what was taken included.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FunctionType
from typing import Any, NamedTuple

import numpy as np
import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from benchmarks.bundles import bundle_of
from fedtt import (
    codec,
    graph_file,
    manifest,
    messages,
    signature,
    wire,
)
from fedtt.algorithms.fedtt import FedTT
from fedtt.codec import CodecSpec, coded, decode_delta, difference, encode_delta, plain, quantise, range_coder
from fedtt.codec.difference import decode_difference, encode_difference
from fedtt.errors import BundleError, WireError
from fedtt.graph_file import graph_needs
from fedtt.layout import Factor, FactorLayout
from fedtt.manifest import MANIFEST, decode_manifest, encode_manifest
from fedtt.messages import (
    CheckIn,
    Code,
    Enroll,
    Failure,
    FailureCode,
    Judge,
    Judged,
    Message,
    Plan,
    Problem,
    Retired,
    Verdict,
    Wait,
    Work,
    decode,
    encode,
)
from fedtt.optimiser import TrainingSpec
from fedtt.signature import Signed, content_digest, parse_signature, signature_headers
from fedtt.wire import UpdateHeader, decode_update, encode_update

__all__ = ["REFUSALS", "Target", "decoders", "targets"]

REFUSALS = (WireError, BundleError)

_LIVE = FactorLayout([Factor("a", (5, 8, 5)), Factor("b", (40,)), Factor("c", (7,))]).everything
_DELTA = np.random.default_rng(0).laplace(0, 0.03, _LIVE.size).astype(np.float32)
_HELD = (np.rint(128 * _DELTA) / 128 + 0.0).astype("<f4").tobytes()
_CODECS = {
    "fp32": CodecSpec(quantise="fp32"),
    "int8": CodecSpec(quantise="int8"),
    "int3": CodecSpec(quantise="int3", block=64),
    "int8-coded": CodecSpec(quantise="int8", coding="range"),
    "ternary-coded": CodecSpec(quantise="ternary", coding="range"),
    "sign-coded": CodecSpec(quantise="sign", coding="range", block=32),
    "rms-coded": CodecSpec(quantise="rms", coding="range", block=32),
}
_READ: tuple[Any, ...] = (Enroll, CheckIn, Verdict, Failure, Work | Judge | Wait | Retired, Problem)


class Target(NamedTuple):
    """One decoder."""

    take: Callable[[bytes], object]
    sound: tuple[bytes, ...]  #: which it takes


def targets() -> dict[str, Target]:
    """name -> target."""
    moved = (np.frombuffer(_HELD, "<f4") + np.float32(1 / 128)).astype("<f4").tobytes()
    exact = _DELTA.astype("<f4").tobytes()
    header = UpdateHeader(layout=bytes(8), examples=3, steps=2, loss_first=1.0, loss_last=0.5)
    return {name: _delta(spec) for name, spec in _CODECS.items()} | {
        "difference": Target(_difference, (encode_difference(_HELD, moved), encode_difference(_HELD, exact))),
        "update": Target(_update, (encode_update(header, b"payload"),)),
        "messages": Target(_messages, tuple(map(encode, _sound_messages()))),
        "signature": Target(_signature, (_sound_signature(),)),
        "manifest": Target(_manifest, (_sound_manifest(),)),
        "graph": Target(_graph, (_sound_graph(),)),
    }


def decoders() -> Iterator[FunctionType]:
    """The functions whose branches guide the fuzzer."""
    read = (codec, coded, difference, plain, quantise, range_coder, wire)
    for module in (*read, graph_file, manifest, messages, signature):
        for value in vars(module).values():
            for member in vars(value).values() if isinstance(value, type) else [value]:
                if isinstance(member, FunctionType) and member.__module__ == module.__name__:
                    yield member


def _delta(spec: CodecSpec) -> Target:
    def take(data: bytes) -> None:
        found = decode_delta(spec, _LIVE, data)
        assert found.shape == (_LIVE.size,)
        assert np.isfinite(found).all()

    return Target(take, (encode_delta(spec, _LIVE, _DELTA, np.random.default_rng(0)),))


def _difference(data: bytes) -> None:
    assert len(decode_difference(_HELD, data)) == len(_HELD)


def _update(data: bytes) -> None:
    header, payload = decode_update(data)
    assert encode_update(header, payload)


def _messages(data: bytes) -> None:
    """As a device and as a server would read them; what was read can be written, and is read alike."""
    for kind in _READ:
        try:
            found = decode(data, kind)
        except WireError:
            continue
        assert decode(encode(found), type(found)) == found


def _sound_messages() -> list[Message]:
    judged = Judged(loss=0.5, right=2)
    plan = Plan(
        task="t",
        seed=1,
        bundle="0" * 64,
        version="0" * 64,
        version_number=0,
        round=1,
        live=(0, 1),
        training=TrainingSpec(),
        codec=CodecSpec(),
        method=FedTT(),
        min_examples=1,
    )
    return [
        Enroll(public_key=bytes(32), token="t" * 8, client="c"),
        CheckIn(client="c", runtimes=("onnxruntime",), examples=3),
        Verdict(examples=3, before=judged, after=judged),
        Failure(code=FailureCode.MEMORY),
        Wait(retry_after_s=3.0),
        Work(lease="0" * 32, expires_in_s=60.0, plan=plan),
        Problem(code=Code.BUSY, detail="d"),
    ]


def _signature(data: bytes) -> None:
    """Three header lines; whoever is taken writes the very lines again."""
    digest, given, value = [*data.decode("latin-1").split("\n", 2), "", ""][:3]
    signed, raw = parse_signature("PUT", "example.org", "/v1", digest, given, value)
    assert _lines(signed, raw) == f"{digest}\n{given}\n{value}".encode("latin-1")


def _lines(signed: Signed, raw: bytes) -> bytes:
    headers = signature_headers(signed, raw)
    return "\n".join((signed.digest, headers["Signature-Input"], headers["Signature"])).encode()


def _sound_signature() -> bytes:
    signed = Signed(
        method="PUT",
        authority="example.org",
        path="/v1",
        digest=content_digest(b""),
        created=1_700_000_000,
        expires=1_700_000_060,
        nonce=1_700_000_000_000_000,
        device="0" * 32,
    )
    return _lines(signed, bytes(64))


def _manifest(data: bytes) -> None:
    found = decode_manifest(data)
    assert decode_manifest(encode_manifest(found)) == found


def _sound_manifest() -> bytes:
    with tempfile.TemporaryDirectory() as directory:
        bundle_of(Path(directory), 40)
        return (Path(directory) / MANIFEST).read_bytes()


def _graph(data: bytes) -> None:
    """No operator and no file that protobuf's own parser finds is missed."""
    needs = graph_needs(data, "the graph")
    try:
        model = onnx.ModelProto.FromString(data)
    except DecodeError:
        return
    pending = [model.graph]
    while pending:
        graph = pending.pop()
        for node in graph.node:
            assert (node.domain, node.op_type) in needs.operators
            for attribute in node.attribute:
                pending += [attribute.g, *attribute.graphs]
        for tensor in graph.initializer:
            named = [entry.value for entry in tensor.external_data if entry.key == "location"]
            assert needs.files.issuperset(named)


def _sound_graph() -> bytes:
    inner = onnx.GraphProto(name="inner", node=[onnx.helper.make_node("Add", ["x", "x"], ["y"])])
    tensor = onnx.TensorProto(name="w", data_type=1, dims=[4], data_location=onnx.TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value="base.bin")
    nodes = [
        onnx.helper.make_node("MatMul", ["x", "w"], ["z"]),
        onnx.helper.make_node("If", ["c"], ["y"], then_branch=inner, else_branch=inner),
    ]
    graph = onnx.GraphProto(name="g", node=nodes, initializer=[tensor])
    return bytes(onnx.ModelProto(ir_version=10, graph=graph).SerializeToString())
