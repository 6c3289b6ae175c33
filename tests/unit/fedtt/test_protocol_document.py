"""docs/protocol.md held against the code: whoever writes a client from it writes one that works."""

from __future__ import annotations

import base64
import hashlib
import re
from enum import Enum
from pathlib import Path

import msgspec
import numpy as np
import pytest
from aiohttp import web
from msgspec import NODEFAULT

from aggregator.app import _HEADER_LIMIT_BYTES, BODY_LIMIT_S
from aggregator.auth import CLOCK_SKEW_S
from aggregator.device_routes import add_device_routes
from edge_client.device import _PASSING
from fedtt.algorithms.gauge import Gauge
from fedtt.codec import CodecSpec, decode_delta, encode_delta
from fedtt.codec.difference import decode_difference
from fedtt.kinds import HeadOnly
from fedtt.layout import Factor, FactorLayout, LiveSet
from fedtt.manifest import MANIFEST_LIMIT_BYTES, DepthGraphs, Graphs
from fedtt.messages import (
    DIFFERENCE_MEDIA_TYPE,
    MEDIA_TYPE,
    MESSAGE_LIMIT_BYTES,
    STATUS,
    CheckIn,
    FailureCode,
    Message,
    UpdateState,
    decode,
    encode,
)
from fedtt.planning import plan_adapter, plan_head
from fedtt.release import SignedAnswer, answer_base, request_signature
from fedtt.signature import signature_base
from fedtt.wire import decode_update, layout_tag, update_limit_bytes
from tests.unit.fedtt import test_signature as signing

DOCUMENT = (Path(__file__).parents[3] / "docs" / "protocol.md").read_text()
MESSAGES = {kind.__name__: kind for kind in Message.__subclasses__()}


def block(name: str) -> str:
    """The fenced block of that name, without its last line end."""
    return DOCUMENT.split(f"\n```{name}\n")[1].split("\n```")[0]


def hex_block(name: str) -> bytes:
    """Its bytes: what stands in each line before two spaces is hex, the rest says what it is."""
    return bytes.fromhex(" ".join(line.split("  ")[0] for line in block(name).splitlines()))


def rows(section: str) -> list[list[str]]:
    """The cells of all table rows below a heading whose first cell is code."""
    text = re.split(r"\n#+ ", DOCUMENT.split(f"# {section}\n")[1])[0]
    lines = (line for line in text.splitlines() if line.startswith("| `"))
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_the_calls_are_the_routes_of_the_server() -> None:
    app = web.Application()
    add_device_routes(app)
    routes = {
        f"{route.method} {route.resource.canonical}"
        for route in app.router.routes()
        if route.resource and route.method != "HEAD"
    }
    assert {row[0].strip("`") for row in rows("Calls")} == routes


def test_every_message_has_a_section_and_no_section_has_none() -> None:
    sections = re.findall(r"\n### (\w+)\n", DOCUMENT.split("\n## Messages\n")[1].split("\n## ")[0])
    assert set(sections) == set(MESSAGES)


@pytest.mark.parametrize("name", MESSAGES)
def test_the_fields_of_a_message_are_listed_in_order_with_the_optional_ones_marked(name: str) -> None:
    table = [row for row in rows(name) if len(row) == 3]
    fields = msgspec.structs.fields(MESSAGES[name])
    assert [row[0].strip("`") for row in table] == [field.name for field in fields]
    assert ["optional" in row[1] for row in table] == [field.default is not NODEFAULT for field in fields]


def test_the_fields_of_the_graphs_are_listed_all() -> None:
    section = DOCUMENT.split("\n## Graphs\n")[1].split("\n## ")[0]
    listed = [line.split("`")[1] for line in section.splitlines() if line.startswith("| `")]
    fields = [{field.name for field in msgspec.structs.fields(kind)} for kind in (Graphs, DepthGraphs)]
    split = len(fields[0])
    assert [set(listed[:split]), set(listed[split:])] == fields


def test_the_codes_and_their_statuses_are_those_of_the_server() -> None:
    table = {row[0].strip("`"): int(row[1]) for row in rows("Problem") if len(row) == 4}
    assert table == {code.value: status for code, status in STATUS.items()}
    assert list(table.values()) == sorted(table.values())


def test_refusals_that_may_pass_are_those_the_client_sends_again_after() -> None:
    passing = {row[0].strip("`") for row in rows("Problem") if len(row) == 4 and row[2] == "passing"}
    assert passing == {code.value for code in _PASSING}


@pytest.mark.parametrize(
    ("section", "field", "kind"), [("Receipt", "state", UpdateState), ("Failure", "code", FailureCode)]
)
def test_the_values_of_an_enumeration_are_all_listed(section: str, field: str, kind: type[Enum]) -> None:
    meaning = next(row[2] for row in rows(section) if row[0] == f"`{field}`")
    assert re.findall(r"`(\w+)`", meaning) == [member.value for member in kind]


def test_the_example_of_a_message_is_what_the_client_writes() -> None:
    message = CheckIn(client="mine 1", runtimes=("onnxruntime",), examples=42)
    assert encode(message) == hex_block("checkin")
    assert decode(hex_block("checkin"), CheckIn) == message
    assert encode(message.as_told()) == hex_block("astold")
    facts = hex_block("facts")
    assert msgspec.msgpack.decode(facts) == ["mine 1", ["onnxruntime"], 42, 0, False]
    assert message.as_told().digest == hashlib.sha256(facts).digest()[:4]


def test_the_example_of_a_frame_is_byte_for_byte_the_golden_one_and_says_what_it_claims() -> None:
    golden = (Path(__file__).parent / "golden" / "update.hex").read_text()
    frame = hex_block("frame")
    assert frame == bytes.fromhex(golden)
    header, payload = decode_update(frame)
    layout = FactorLayout([Factor("a", (3,)), Factor("b", (1, 2))])
    assert header.layout == layout_tag(layout)
    assert (header.examples, header.steps, header.loss_first, header.loss_last) == (12, 10, 1.5, 0.75)
    live = LiveSet(layout, [0])
    delta = np.array([0.5, -0.25, 1.0], np.float32)
    rng = np.random.default_rng(0)
    assert encode_delta(CodecSpec(quantise="int4"), live, delta, rng) == payload
    step = 0.143555
    np.testing.assert_allclose(
        decode_delta(CodecSpec(quantise="int4"), live, payload), [3 * step, -2 * step, 7 * step], rtol=1e-5
    )
    as_int8 = encode_delta(CodecSpec(quantise="int8"), live, delta, rng).hex(" ")
    assert f"As `int8` the same change is `{as_int8}`." in DOCUMENT


def test_the_example_of_a_difference_is_the_golden_one_and_gives_the_version_that_stands_there() -> None:
    golden = (Path(__file__).parent / "golden" / "difference.hex").read_text()
    assert hex_block("difference") == bytes.fromhex(golden)
    held, new = (
        np.array([int(word, 16) for word in words.split()], "<u4")
        for words in ("3f000000 be800000 3f800000", "3f000000 be800103 3f7ffffe")
    )
    for words in (held, new):
        assert f"`{' '.join(f'{word:08x}' for word in words)}`" in DOCUMENT
    np.testing.assert_array_equal(held.view("<f4"), np.array([0.5, -0.25, 1.0], np.float32))
    np.testing.assert_allclose(new.view("<f4"), [0.5, -0.2500077, 0.9999999], rtol=1e-7)
    assert decode_difference(held.tobytes(), hex_block("difference")) == new.tobytes()
    assert f"`{DIFFERENCE_MEDIA_TYPE}`" in DOCUMENT


def test_the_example_of_orthonormal_coordinates_is_what_a_device_computes() -> None:
    head = plan_head("tt", hidden=2, labels=2, rank=2)
    adapter = plan_adapter(HeadOnly(), hidden=2, layers=1, head=head)  # 2 | 2: two cores, and the bias
    theta = np.array([2, 1, 1, 2, 1, 0, 0, 1, 0, 0], np.float32)
    gauge = Gauge(adapter, theta, LiveSet(adapter.layout, [1]))
    np.testing.assert_allclose(gauge.enter(theta[4:8]), [2, 1, 1, 2], atol=1e-12)
    change = gauge.leave(np.array([3.0, 0, 0, 3]))
    np.testing.assert_allclose(change, [2, -1, -1, 2], atol=1e-12)
    text = " ".join(DOCUMENT.split())
    assert "L = ((2, 1), (1, 2)) and a last core G = ((1, 0), (0, 1))" in text
    assert "G' is ((2, 1), (1, 2)); the change (3, 0, 0, 3) of G' is one of (2, -1, -1, 2) of G" in text


def test_the_example_of_a_layout_has_the_hash_that_stands_there() -> None:
    digest = hashlib.sha256(block("layout").encode()).hexdigest()
    assert digest == block("layout-sha256")
    assert digest == FactorLayout([Factor("a", (3,)), Factor("b", (1, 2))]).digest


def test_the_test_vector_of_the_signature_is_the_one_the_code_makes() -> None:
    assert bytes.fromhex(block("key")) == signing.PUBLIC
    assert block("base").encode() == signature_base(signing.SIGNED)
    headers = dict(line.split(": ", 1) for line in block("headers").splitlines())
    assert headers == signing.HEADERS
    assert f"`{signing.SIGNED.device}`" in DOCUMENT


def test_the_test_vector_of_a_signed_answer_is_the_one_the_code_makes() -> None:
    answer = SignedAnswer(
        status=200,
        digest=signing.SIGNED.digest,
        request_signature=request_signature(signing.HEADERS["Signature"]),
        created=1_700_000_001,
        server_key=signing.PUBLIC,
    )
    assert block("answer-base").encode() == answer_base(answer)
    value = base64.b64encode(signing.KEY.sign(answer_base(answer))).decode()
    assert block("answer-signature") == f"sig1=:{value}:"


def test_the_limits_are_those_of_the_code() -> None:
    assert f"`{MEDIA_TYPE}`" in DOCUMENT
    table = DOCUMENT.split("\n## Limits\n")[1].split("\n## ")[0]
    assert f"| a message | {MESSAGE_LIMIT_BYTES:,} bytes |" in table
    assert f"| a frame | {update_limit_bytes(0)} bytes + payload, 2 a label more" in table  # 10 + 256 + 4
    assert update_limit_bytes(0, labels=3) == update_limit_bytes(0) + 6
    assert f"| a manifest | {MANIFEST_LIMIT_BYTES:,} bytes |" in table
    assert f"| a header line | {_HEADER_LIMIT_BYTES:,} bytes |" in table
    assert f"| time for a body | {BODY_LIMIT_S:.0f} s |" in table
    assert f"| distance of `created` from the server's time | {CLOCK_SKEW_S:.0f} s |" in table
