"""What `benchmarks.fuzz` throws bytes at: decoders of foreign bytes, with sound inputs to begin with.

A target returns for bytes that its decoder takes and raises its `refusal` for those that it refuses; anything
else is a finding, a broken law about what was taken included (`law`).
"""

from __future__ import annotations

import atexit
import struct
import tempfile
import zlib
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from types import FunctionType
from typing import Any

import numpy as np
import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from google.protobuf.message import Message as Protobuf
from safetensors.numpy import load

from benchmarks.bundles import bundle_of
from benchmarks.fuzz_inputs import (
    LABELS,
    sound_config,
    sound_factors,
    sound_graphs,
    sound_manifest,
    sound_messages,
    sound_tokenizers,
    sound_updates,
)
from benchmarks.fuzz_programs import names_in, sound_programs
from benchmarks.fuzz_signed import signed_targets
from benchmarks.fuzz_target import Target, law
from benchmarks.fuzz_weights import data_in, sound_weights
from edge_client import tokens
from edge_client.bundle import Bundle
from edge_client.tokens import Tokens
from fedtt import (
    codec,
    factor_file,
    flat_buffer,
    graph_file,
    label_counts,
    manifest,
    messages,
    program_file,
    release,
    signature,
    version_config,
    weights_file,
    wire,
)
from fedtt.codec import CodecSpec, coded, decode_delta, difference, encode_delta, plain, quantise, range_coder
from fedtt.codec.difference import decode_difference, encode_difference
from fedtt.errors import BundleError, LayoutError, WireError
from fedtt.factor_file import decode_factors
from fedtt.graph_file import graph_needs
from fedtt.label_counts import COUNT_LIMIT, decode_label_counts, encode_label_counts
from fedtt.layout import Factor, FactorLayout
from fedtt.manifest import decode_manifest, encode_manifest
from fedtt.messages import (
    AsTold,
    CheckIn,
    Enroll,
    Enrolled,
    Failure,
    Judge,
    Message,
    Problem,
    Receipt,
    Retired,
    Tell,
    Verdict,
    Wait,
    Work,
    decode,
    decode_check_in,
    encode,
)
from fedtt.program_file import program_needs
from fedtt.version_config import decode_config, encode_config
from fedtt.weights_file import stored_data
from fedtt.wire import decode_update, encode_update

__all__ = ["decoders", "targets"]

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
_READ: tuple[Any, ...] = (
    *(Enroll, Enrolled, CheckIn, AsTold, Verdict, Failure, Receipt, Problem),
    Work | Judge | Wait | Retired | Tell,
)


def targets() -> dict[str, Target]:
    """name -> target."""
    moved = (np.frombuffer(_HELD, "<f4") + np.float32(1 / 128)).astype("<f4").tobytes()
    exact = _DELTA.astype("<f4").tobytes()
    return {name: _delta(spec) for name, spec in _CODECS.items()} | {
        "difference": Target(_difference, (encode_difference(_HELD, moved), encode_difference(_HELD, exact))),
        "update": Target(_update, sound_updates()),
        "messages": Target(_messages, sound_messages()),
        "label-counts": Target(_label_counts, (encode_label_counts([3, -1, 0, 2]),)),
        **signed_targets(),
        "factors": Target(_factors, sound_factors(_LIVE.layout), BundleError),
        "manifest": Target(_manifest, (sound_manifest(),), BundleError),
        "config": Target(_config, (sound_config(),), BundleError),
        "graph": Target(_graph, sound_graphs(), BundleError),
        "program": Target(_program, sound_programs(), BundleError),
        "weights": Target(_weights, sound_weights(), BundleError),
        "tokenizer": Target(_tokenizer, sound_tokenizers(), BundleError),
    }


def decoders() -> Iterator[FunctionType]:
    """The functions whose branches guide the fuzzer."""
    read = (codec, coded, difference, plain, quantise, range_coder, wire)
    files = (factor_file, flat_buffer, graph_file, manifest, program_file, weights_file)
    for module in (*read, *files, label_counts, messages, release, signature, tokens, version_config):
        for value in vars(module).values():
            for found in vars(value).values() if isinstance(value, type) else [value]:
                member = getattr(found, "__func__", found)  # of a class's method
                if isinstance(member, FunctionType) and member.__module__ == module.__name__:
                    yield member


def _delta(spec: CodecSpec) -> Target:
    def take(data: bytes) -> None:
        found = decode_delta(spec, _LIVE, data)
        assert found.shape == (_LIVE.size,)
        assert np.isfinite(found).all()

    sound = (encode_delta(spec, _LIVE, _DELTA, np.random.default_rng(0)),)
    return Target(take, sound, share=3 if spec.coding == "range" else 1)


def _difference(data: bytes) -> None:
    assert len(decode_difference(_HELD, data)) == len(_HELD)


def _update(data: bytes) -> None:
    """As it came, and with sound lengths and checksum, without which nothing of its header is read."""
    for frame in (data, _framed(data)):
        try:
            found = decode_update(frame, LABELS)
        except WireError:
            continue
        with law():
            assert decode_update(encode_update(*found), LABELS) == found


def _framed(data: bytes) -> bytes:
    """The same, with the lengths and the checksum that belong to it (the layout is in `fedtt.wire`)."""
    body = data[10:-4]
    head_bytes = min(int.from_bytes(data[4:6], "little"), len(body))
    frame = data[:4] + struct.pack("<HI", head_bytes, len(body) - head_bytes) + body
    return frame + struct.pack("<I", zlib.crc32(frame))


def _messages(data: bytes) -> None:
    """As a device and as a server would read them; what was read can be written, and is read alike."""
    reads: list[Callable[[bytes], Message]] = [partial(decode, kind=kind) for kind in _READ]
    for read in (*reads, decode_check_in):
        try:
            found = read(data)
        except WireError:
            continue
        with law():
            assert decode(encode(found), type(found)) == found


def _factors(data: bytes) -> None:
    """The library of the format reads the same."""
    try:
        found = decode_factors(data, _LIVE.layout, "the factors", "download them again")
    except LayoutError:
        return
    np.testing.assert_array_equal(found, _LIVE.layout.flatten(load(data)))


def _manifest(data: bytes) -> None:
    found = decode_manifest(data)
    with law():
        assert decode_manifest(encode_manifest(found)) == found


def _config(data: bytes) -> None:
    found = decode_config(data)
    with law():
        assert decode_config(encode_config(found)) == found


def _label_counts(data: bytes) -> None:
    found = decode_label_counts(data, LABELS)
    assert found.shape == (LABELS,)
    kept = np.clip(found, -COUNT_LIMIT, COUNT_LIMIT)
    with law():
        np.testing.assert_array_equal(decode_label_counts(encode_label_counts(found), LABELS), kept)


def _graph(data: bytes) -> None:
    """No operator and no file is missed that protobuf's own parser finds anywhere, and no code is let in."""
    needs = graph_needs(data, "the graph")
    try:
        model = onnx.ModelProto.FromString(data)
    except DecodeError:
        return
    assert not model.functions
    assert not model.training_info
    for part in _parts(model):
        if isinstance(part, onnx.NodeProto):
            assert (part.domain, part.op_type) in needs.operators
        if isinstance(part, onnx.TensorProto):
            named = [entry.value for entry in part.external_data if entry.key == "location"]
            assert needs.files.issuperset(named)


def _program(data: bytes) -> None:
    """FlatBuffers' own reader finds the same operators and back ends."""
    needs = program_needs(data, "the program")
    assert names_in(data) == needs


def _weights(data: bytes) -> None:
    """FlatBuffers' own reader finds the same, and all of it lies within the file."""
    found = stored_data(data, "the weights")
    assert data_in(data) == found
    assert all(0 <= stored.start <= stored.stop <= len(data) for stored in found.values())


def _tokenizer(data: bytes) -> None:
    """As a device reads it, and texts with it; its own code is Rust, which nothing guides."""
    bundle = _bundle()
    bundle.path(bundle.manifest.tokenization.file).write_bytes(data)
    read = Tokens(bundle)
    rows, _ = read.rows(["wake me at seven", ("a\u0000b", "\u0130\U0001f600 " * 20), "[b]"])
    for row in rows:
        assert len(row) <= bundle.manifest.tokenization.max_tokens
        read.text(row)


@cache
def _bundle() -> Bundle:
    """In a directory that goes with the process, whose tokenizer is written anew for each input."""
    directory = tempfile.TemporaryDirectory()
    atexit.register(directory.cleanup)
    return bundle_of(Path(directory.name), 40)


def _parts(message: Protobuf) -> Iterator[Protobuf]:
    """A message and all within it, whatever field they are in."""
    pending = [message]
    while pending:
        yield (part := pending.pop())
        for field, value in part.ListFields():
            if field.message_type is not None:
                pending += [value] if isinstance(value, Protobuf) else value
