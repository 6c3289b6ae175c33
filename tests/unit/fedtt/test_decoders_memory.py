"""Decoders of foreign bytes are bounded and total: a value or a typed error, in a fixed multiple of memory.

The multiples are those that the decoders' docstrings state: of the size that the layout declares, or of the
bytes that came where nothing else is declared.
"""

from __future__ import annotations

import contextlib
import tracemalloc
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import get_args

import msgspec
import numpy as np
import pytest
from safetensors.numpy import save

from benchmarks.fuzz_programs import program_bytes
from benchmarks.fuzz_weights import Named, weights_bytes
from fedtt.adapter import MOST_FACTORS, AdapterSpec
from fedtt.codec import CodecSpec, check_deltas, decode_deltas, encode_delta, payload_bytes
from fedtt.codec.difference import decode_difference, encode_difference
from fedtt.errors import BundleError, FedttError
from fedtt.factor_file import decode_factors
from fedtt.graph_file import graph_needs
from fedtt.kinds import Lora, LoraTarget, Target
from fedtt.layout import Factor, FactorLayout, LiveSet
from fedtt.manifest import FORMAT, decode_manifest
from fedtt.messages import Work, decode, decode_answer, decode_check_in
from fedtt.program_file import program_needs
from fedtt.weights_file import stored_data
from fedtt.wire import UpdateHeader, decode_theta, decode_update, encode_update, version_digest
from tests.support.codecs import CODED, PLAIN

KIB = 1 << 10
ONE = FactorLayout([Factor("a", (40, 50))]).everything
MANY = FactorLayout([Factor(str(i), (1 + i % 5,)) for i in range(300)]).everything
BLOCKS = (0, 16, 1)
KINDS = [
    msgspec.structs.replace(codec, block=block)
    for codec in (*PLAIN, *CODED, CodecSpec(quantise="rms", coding="range", keep=0.01, threshold=0.5))
    for block in (BLOCKS if codec.quantise != "fp32" else (0,))
]


def peak_bytes(take: Callable[..., object], *given: object) -> int:
    """The most memory that it held at once, whether it takes what came or refuses it by a typed error."""
    tracemalloc.start()
    try:
        with contextlib.suppress(FedttError):
            take(*given)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def sound(codec: CodecSpec, live: LiveSet) -> bytes:
    rng = np.random.default_rng(0)
    return encode_delta(codec, live, rng.laplace(0, 0.03, live.size).astype(np.float32), rng)


def payloads(codec: CodecSpec, live: LiveSet) -> Iterator[bytes]:
    """A sound one, and those that say more than they carry or carry more than there is room for."""
    most, rng = payload_bytes(codec, live), np.random.default_rng(1)
    yield sound(codec, live)
    yield from (b"", bytes(most), b"\xff" * most, b"\xff" * (most + 1), rng.bytes(most), bytes(100 * most))
    if codec.coding == "range":
        # a stream that ends at once reads as zeros for ever; the others as ones, and as anything
        yield from (b"\1" + rest for rest in (b"", b"\x7f", b"\xff" * (most - 1), rng.bytes(most - 1)))


@pytest.mark.parametrize("live", [ONE, MANY], ids=["one-factor", "many-factors"])
@pytest.mark.parametrize("codec", KINDS, ids=repr)
def test_a_payload_takes_six_times_what_it_declares(codec: CodecSpec, live: LiveSet) -> None:
    payload_bytes(codec, live)  # which keeps what it finds out of a layout
    declared_bytes = 4 * live.size
    most_bytes = 6 * declared_bytes + 2 * KIB * len(live.sizes)
    for payload in payloads(codec, live):
        for take in (decode_deltas, check_deltas) if codec.coding == "plain" else (decode_deltas,):
            assert peak_bytes(take, codec, live, [payload]) <= most_bytes
    if codec.quantise != "fp32":  # whose numbers are those of the payload itself
        found = peak_bytes(decode_deltas, codec, live, [sound(codec, live)])
        assert found >= declared_bytes, "the value itself is counted"


@pytest.mark.parametrize("codec", [*PLAIN, *CODED], ids=repr)
def test_payloads_together_take_as_much_for_each(codec: CodecSpec) -> None:
    together = [sound(codec, ONE)] * 7 + [b"\1"] * (codec.coding == "range")
    most_bytes = 6 * len(together) * 4 * ONE.size + 2 * KIB * len(ONE.sizes)
    assert peak_bytes(decode_deltas, codec, ONE, together) <= most_bytes


def floats(seed: int, count: int = 50_000) -> bytes:
    return np.random.default_rng(seed).normal(0, 0.3, count).astype("<f4").tobytes()


def multiples(seed: int, count: int = 50_000) -> bytes:
    return np.random.default_rng(seed).integers(-100, 100, count).astype("<f4").tobytes()


@pytest.mark.parametrize(
    "data",
    [
        encode_difference(floats(0), floats(1)),
        encode_difference(multiples(0), multiples(1)),
        *(bytes([places]) + zlib.compress(bytes(1 << 24), 9) for places in (0, 255)),  # 80 times too much
        *(bytes([places]) + zlib.compress(floats(2, 1 << 20), 0) for places in (0, 255)),  # not packed at all
        encode_difference(floats(0), floats(1)) + bytes(1 << 22),
        b"\xff" + bytes(1 << 22),
        b"",
    ],
    ids=len,
)
@pytest.mark.parametrize("held", [floats(0), multiples(0), b""], ids=["floats", "multiples", "nothing"])
def test_a_difference_takes_ten_times_the_version(held: bytes, data: bytes) -> None:
    assert peak_bytes(decode_difference, held, data) <= 10 * len(held) + 64 * KIB


def test_a_frame_takes_its_size_again_and_a_version_twice() -> None:
    header = UpdateHeader(layout=bytes(8), examples=1, steps=1, loss_first=1.0, loss_last=1.0)
    frame = encode_update(header, floats(0))
    long_head = frame[:4] + b"\xff\xff" + frame[6:]
    long_payload = frame[:6] + b"\xff\xff\xff\xff" + frame[10:]
    for given in (frame, frame[:-1], frame[:-1] + b"!", frame + bytes(9), long_head, long_payload):
        assert peak_bytes(decode_update, given) <= 2 * len(given) + 64 * KIB
    assert peak_bytes(decode_update, frame) >= len(floats(0)), "the payload itself is counted"
    layout, digest = FactorLayout([Factor("a", (50_000,))]), version_digest(floats(0))
    for data in (floats(0), floats(1), floats(0) + bytes(1 << 20)):
        found = peak_bytes(decode_theta, data, layout, digest)
        assert found <= 2 * 4 * layout.size + KIB


SOME = FactorLayout([Factor(str(i), (1 + i % 5,)) for i in range(300)])
NUMBERS = save(SOME.unflatten(np.zeros(SOME.size, np.float32)))
ENTRY = b'{"dtype":"F32","shape":[],"data_offsets":[0,0]}'


@pytest.mark.parametrize(
    "header",
    [
        NUMBERS[8 : 8 + int.from_bytes(NUMBERS[:8], "little")],
        b"{" + b",".join(b'"%x":0' % i for i in range(17_000)) + b"}",  # as many as the header may have
        b"{" + b",".join(b'"%x":%s' % (i, ENTRY) for i in range(3000)) + b"}",
        b'{"__metadata__":{' + b",".join(b'"%x":""' % i for i in range(16_000)) + b"}}",
        b'{"a":{"dtype":"F32","shape":[%s1],"data_offsets":[0,4]}}' % (b"1," * 80_000),
        b"{" + b" " * 10**7 + b"}",
    ],
    ids=["sound", "names", "entries", "metadata", "shape", "long"],
)
def test_factors_take_twice_their_bytes_and_8_kib_each(header: bytes) -> None:
    data = len(header).to_bytes(8, "little") + header + NUMBERS[-4 * SOME.size :]
    decode_factors(NUMBERS, SOME, "f", "r")
    most_bytes = 2 * len(data) + 8 * KIB * len(SOME.factors) + 512 * KIB
    assert peak_bytes(decode_factors, data, SOME, "f", "r") <= most_bytes


PLAN = {"type": "work", "lease": "0" * 32, "expires_in_s": 1.0}


@pytest.mark.parametrize(
    "message",
    [
        {**PLAN, "plan": {"live": list(range(256, 5400))}},  # the longest that 16 KiB hold
        {**PLAN, "plan": {"live": [[[]]] * 8000}},
        {**PLAN, "plan": {"method": {f"{i:x}": [] for i in range(2500)}}},
        {**PLAN, **{f"{i:x}": "" for i in range(2500)}},
        {"type": "checkin", "client": "c", "runtimes": ["ab"] * 5000, "examples": 1},
        {"type": "wait", "retry_after_s": 1.0, "reason": "\U0001f600" * 4000},
    ],
    ids=["live", "lists", "method", "unknown", "runtimes", "reason"],
)
def test_a_message_takes_24_times_its_bytes(message: dict[str, object]) -> None:
    data = msgspec.msgpack.encode(message)
    for given in (data, data * 100):
        for take in (decode_answer, decode_check_in, partial(decode, kind=Work)):
            with contextlib.suppress(FedttError):
                take(b"\x80")  # what msgspec makes of a type it keeps
            assert peak_bytes(take, given) <= 24 * len(data) + 16 * KIB


_PROJECTIONS = [LoraTarget(name=n, d_in=2, d_out=2) for n in get_args(Target)]


def manifest(**changes: object) -> bytes:
    """The parts of a manifest that are read one by one, of the right form."""
    adapter = AdapterSpec(
        hidden=2,
        layers=1024,
        depth=1024,
        inserted=Lora(rank=1, alpha=1.0, targets=tuple(_PROJECTIONS)),
    )
    assert len(adapter.layout.factors) == MOST_FACTORS
    graphs = {"step": "s", "eval": "e", "weights": ["w"]}
    sound = {
        "format": FORMAT,
        "task": "causal-lm",
        "model": {"name": "m", "architecture": "a", "base_sha256": "0" * 64, "vocabulary": 1},
        "adapter": adapter,
        "layout_sha256": adapter.layout.digest,
        "labels": [],
        "tokenization": {"file": "t", "pad_id": 0, "min_tokens": 1, "max_tokens": 9},
        "graphs": {"onnxruntime": graphs},
        "opset": 20,
        "requires": {},
        "initial": "i",
        "files": {name: {"sha256": "0" * 64, "bytes": 1 << 40} for name in "sewti"},
    }
    return msgspec.json.encode({**sound, **changes})


MANY_NAMES = {f"{i:x}": "" for i in range(80_000)}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"labels": ["ab"] * 190_000},
        {"requires": MANY_NAMES},
        {"files": {f"{i:x}": {"sha256": "0" * 64, "bytes": 1} for i in range(9000)}},
        {"graphs": {"onnxruntime": {"step": "s", "eval": "e", "weights": ["ab"] * 190_000}}},
        MANY_NAMES,
    ],
    ids=["sound", "labels", "requires", "files", "weights", "unknown"],
)
def test_a_manifest_takes_24_times_its_bytes_and_its_factors(changes: dict[str, object]) -> None:
    data = manifest(**changes)
    assert peak_bytes(decode_manifest, data) <= 24 * len(data) + 2 * KIB * MOST_FACTORS


def test_the_manifest_that_declares_most_is_sound() -> None:
    assert len(decode_manifest(manifest()).adapter.layout.factors) == MOST_FACTORS


def field(number: int, content: bytes) -> bytes:
    """One of protobuf's, of wire type 2."""
    size, head = len(content), bytes([number << 3 | 2])
    while size > 127:
        head, size = head + bytes([size & 127 | 128]), size >> 7
    return head + bytes([size]) + content


def deep(count: int) -> bytes:
    """Graphs in attributes of nodes, so many within each other."""
    graph = b""
    for _ in range(count):
        graph = field(1, field(5, field(6, graph)))
    return field(7, graph)


@pytest.mark.parametrize(
    ("graph", "complaint"),
    [
        (field(7, field(1, field(4, b"Add")) * 1000), ""),
        (field(7, field(1, b"") * 20_000), ""),
        (field(7, field(1, field(4, b"ab" * 500_000 + "\U0001f600".encode()))), ""),
        (field(7, field(1, field(4, b"ab") * 5000 + field(7, b"cd") * 5000)), "a message with two operators"),
        (field(7, b"".join(field(1, field(4, b"%d" % i)) for i in range(2000))), "more than 1000 operators"),
        (deep(1000), "more than 100 messages within each other"),
        (field(7, b"")[:1] + b"\xff\xff\xff\xff\x07", "a field of 2147483647 bytes where 0 are left"),
    ],
    ids=["sound", "nodes", "text", "two", "kinds", "deep", "claims"],
)
def test_a_graph_takes_six_times_its_bytes(graph: bytes, complaint: str) -> None:
    assert peak_bytes(graph_needs, graph, "g") <= 6 * len(graph) + 1024 * KIB
    with pytest.raises(BundleError, match=complaint) if complaint else contextlib.nullcontext():
        graph_needs(graph, "g")


@pytest.mark.parametrize(
    ("program", "complaint"),
    [
        (program_bytes([("aten::add", "out")]), ""),
        (program_bytes([("aten::add", "out")] * 900, plans=20), ""),  # 20 · 906 parts
        (program_bytes([("aten::add", "out")] * 900, plans=50_000), "more than 20000 parts"),
        (program_bytes([("a" * 200, f"{i:0200}") for i in range(1100)]), "more than 1000 operators"),
        (program_bytes([("a" * 201, "")]), "a name of 201 bytes"),
    ],
    ids=["sound", "plans", "parts", "kinds", "long"],
)
def test_a_program_takes_two_mebibytes(program: bytes, complaint: str) -> None:
    assert peak_bytes(program_needs, program, "p") <= 2048 * KIB
    with pytest.raises(BundleError, match=complaint) if complaint else contextlib.nullcontext():
        program_needs(program, "p")


@pytest.mark.parametrize(
    ("names", "lengths", "complaint"),
    [
        (8192, [24], ""),
        (8193, [24], "more than 8192 names"),
        (1, [0] * 8193, "more than 8192 names"),
    ],
    ids=["sound", "names", "segments"],
)
def test_weights_take_8_mebibytes(names: int, lengths: list[int], complaint: str) -> None:
    weights = weights_bytes([Named(f"t{i:0199}") for i in range(names)], lengths)
    assert peak_bytes(stored_data, weights, "w") <= 8 * 1024 * KIB
    with pytest.raises(BundleError, match=complaint) if complaint else contextlib.nullcontext():
        stored_data(weights, "w")
