"""Messages, bodies and connections that are no protocol: bounded in length and time, refused in one line."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import gzip
import logging
from collections.abc import AsyncIterator

import msgspec
import pytest
from aiohttp.http_exceptions import HttpProcessingError
from yarl import URL

from aggregator.metrics import totals
from fedtt.messages import MEDIA_TYPE, MESSAGE_LIMIT_BYTES, Code, encode
from fedtt.wire import update_limit_bytes
from tests.support.served import CHECK_IN, LAYOUT, Answer, Attacked, Peer, frame_of, refused

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.usefixtures("nothing_accepted_is_lost")]

NOWHERE = "/v1/leases/" + "0" * 32
NOBODY = "0" * 64


# messages and bodies

MESSAGES = {
    "unknown field `surprise`": {
        "type": "checkin",
        "client": "",
        "runtimes": [],
        "examples": 1,
        "surprise": 1,
    },
    "field `examples`": {"type": "checkin", "client": "", "runtimes": []},
    "Invalid value 'enroll'": {"type": "enroll", "client": "", "runtimes": [], "examples": 1},
    "at `$.examples`": {"type": "checkin", "client": "", "runtimes": [], "examples": -1},
    "at `$.runtimes`": {"type": "checkin", "client": "", "runtimes": ["x"] * 9, "examples": 1},
    "at `$.client`": {"type": "checkin", "client": "x" * 101, "runtimes": [], "examples": 1},
}


@pytest.mark.parametrize("said", MESSAGES)
async def test_a_message_that_is_not_the_protocols_is_refused_with_the_field(device: Peer, said: str) -> None:
    answer = await device.request("POST", "/v1/check-in", msgspec.msgpack.encode(MESSAGES[said]))
    refused(answer, Code.MALFORMED, "not a valid message", said)


@pytest.mark.parametrize(
    "body", [b"", b"\xc1", b"{}", b"\x91" * 10_000, b"\xdf\xff\xff\xff\xff", encode(CHECK_IN)[:-1]]
)
async def test_bytes_that_are_no_message_are_refused(device: Peer, body: bytes) -> None:
    refused(await device.request("POST", "/v1/check-in", body), Code.MALFORMED, "not a valid message")


async def pieces(data: bytes) -> AsyncIterator[bytes]:
    """A body whose length is not announced."""
    yield data


@pytest.mark.parametrize("announced", [True, False])
async def test_a_message_over_the_limit_is_cut_off(place: Attacked, announced: bool) -> None:
    data = bytes(MESSAGE_LIMIT_BYTES + 1)
    headers = place.honest.signed("POST", "/v1/enroll", data[:-1])
    answer = await place.server.raw("POST", "/v1/enroll", data if announced else pieces(data), headers)
    refused(answer, Code.TOO_LARGE, "longer than the 16384 bytes this call takes")
    body = data[:-1] if announced else pieces(data[:-1])
    short = await place.server.raw("POST", "/v1/enroll", body, headers)
    refused(short, Code.MALFORMED)


@pytest.mark.parametrize("announced", [True, False])
async def test_an_update_may_be_as_long_as_its_plan_needs_and_no_longer(
    place: Attacked, device: Peer, announced: bool
) -> None:
    limit = update_limit_bytes(4 * LAYOUT.size)
    path, data = f"/v1/leases/{(await device.work()).lease}/update", bytes(limit + 1)
    headers = device.signed("PUT", path, data)
    answer = await place.server.raw("PUT", path, data if announced else pieces(data), headers)
    refused(answer, Code.TOO_LARGE, f"longer than the {limit} bytes", "send what the plan asks for")


async def _pour(writer: asyncio.StreamWriter) -> None:
    while True:
        writer.write(b"10000\r\n" + bytes(65536) + b"\r\n")
        await writer.drain()
        await asyncio.sleep(0.005)


def enrolling(place: Attacked, *more: str) -> bytes:
    """The head of a signed enrolment."""
    headers = {"Host": "x"} | place.honest.signed("POST", "/v1/enroll")
    lines = [f"{name}: {value}" for name, value in headers.items()]
    return "\r\n".join(["POST /v1/enroll HTTP/1.1", *lines, *more, "", ""]).encode()


async def test_an_unsigned_body_is_not_read_at_all(place: Attacked) -> None:
    reader, writer = await place.server.connect()
    writer.write(b"POST /v1/enroll HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n")
    async with asyncio.timeout(5):
        assert (await reader.readline()).startswith(b"HTTP/1.1 401 ")
    writer.close()


async def test_an_endless_body_is_answered_and_cut(place: Attacked) -> None:
    reader, writer = await place.server.connect()
    writer.write(enrolling(place, "Transfer-Encoding: chunked"))
    said = asyncio.create_task(reader.read(4096))
    async with asyncio.timeout(10):
        with pytest.raises(ConnectionError):
            await _pour(writer)
    assert b"413" in said.result().split(b"\r\n")[0]
    assert b"longer than the 16384 bytes" in said.result()
    writer.close()


async def test_a_compressed_body_is_not_unpacked(place: Attacked, device: Peer) -> None:
    bomb = gzip.compress(bytes(10_000_000))
    assert len(bomb) < MESSAGE_LIMIT_BYTES
    for coding in ("gzip", "deflate", "br", "nonsense"):
        headers = device.signed("POST", "/v1/enroll", bomb) | {"Content-Encoding": coding}
        answer = await place.server.raw("POST", "/v1/enroll", bomb, headers)
        refused(answer, Code.MALFORMED, "Content-Encoding is not taken: send the body as it is")
    path = f"/v1/leases/{(await device.work()).lease}/update"
    headers = device.signed("PUT", path, bomb)
    refused(await place.server.raw("PUT", path, bomb, headers | {"Content-Encoding": "gzip"}), Code.MALFORMED)


async def test_a_body_that_is_not_the_signed_one_is_refused(device: Peer) -> None:
    answer = await device.request("POST", "/v1/check-in", encode(CHECK_IN), claimed=b"something else")
    refused(answer, Code.BAD_SIGNATURE, "Content-Digest does not match the body")
    work = await device.work()
    path, frame = f"/v1/leases/{work.lease}/update", frame_of(work.plan)
    swapped = await device.request("PUT", path, frame_of(work.plan, examples=1000), claimed=frame)
    refused(swapped, Code.BAD_SIGNATURE, "Content-Digest does not match the body")


# the network


@pytest.mark.parametrize("begun", [b"", b"POST /v1/en", b"POST /v1/enroll HTTP/1.1\r\nHost: x\r\nX-Slow: "])
async def test_a_connection_without_a_whole_request_is_closed(place: Attacked, begun: bytes) -> None:
    idle = place.server.service.metrics.connections_idle
    before = totals(idle, "awaited")
    reader, writer = await place.server.connect()
    writer.write(begun)
    async with asyncio.timeout(5):
        assert await reader.read() == b""
    writer.close()
    after = totals(idle, "awaited")
    assert after["request"] >= before["request"] + 1
    assert after["handshake"] == 0  # without TLS there is none


ASKED = b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n"
AFTER = {  # a whole request -> what comes then, and whether that is the beginning of another
    "nothing": (b"", 0),
    "an empty line": (b"\r\n", 0),
    "a method": (b"POST", 1),
    "a field": (b"POST /v1/enroll HTTP/1.1\r\nHost: x\r\nX-Slow: ", 1),
}


@pytest.mark.parametrize("at_once", [True, False])
@pytest.mark.parametrize("what", AFTER)
async def test_a_head_that_never_ends_counts_on_a_connection_that_brought_a_request_before_and_rest_does_not(
    place: Attacked, what: str, at_once: bool
) -> None:
    then, counts = AFTER[what]
    idle = place.server.service.metrics.connections_idle
    reader, writer = await place.server.connect()
    writer.write(ASKED + (then if at_once else b""))
    async with asyncio.timeout(5):
        assert (await reader.readline()).startswith(b"HTTP/1.1 200 ")
        before = totals(idle, "awaited")
        writer.write(b"" if at_once else then)
        await reader.read()
    writer.close()
    after = totals(idle, "awaited")
    assert after == before | {"request": before["request"] + counts}


async def test_a_body_that_does_not_come_is_not_waited_for(place: Attacked) -> None:
    reader, writer = await place.server.connect()
    writer.write(enrolling(place, "Content-Length: 100") + b"half")
    async with asyncio.timeout(5):
        said = await reader.read()
    assert said.startswith(b"HTTP/1.1 400 ")
    assert b"the body did not arrive within 0.3 s" in said
    writer.close()


async def test_a_file_of_a_bundle_may_take_its_time_but_not_rest(place: Attacked) -> None:
    listening = place.server.listening
    url = URL(listening.admin_url)
    reader, writer = await asyncio.open_connection(url.host, url.port)
    head = f"PUT /v1/admin/blobs/{NOBODY} HTTP/1.1\r\nHost: {url.authority}\r\nContent-Length: 100\r\n"
    writer.write(f"{head}Authorization: Bearer {listening.admin_token}\r\n\r\n".encode())
    for _ in range(5):  # longer than a rest may be
        writer.write(b"piece")
        await asyncio.sleep(0.1)
    async with asyncio.timeout(5):
        said = await reader.read()
    assert said.startswith(b"HTTP/1.1 400 ")
    assert b"no more of the body came within 0.3 s" in said
    writer.close()


async def test_a_sender_that_hangs_up_is_no_bug_of_the_server(
    place: Attacked, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG):
        for begun in (b"half", b""):
            _, writer = await place.server.connect()
            writer.write(enrolling(place, "Content-Length: 100") + begun)
            await writer.drain()
            await asyncio.sleep(0.05)
            writer.close()
        await asyncio.sleep(0.1)
    assert [record.message for record in caplog.records if record.levelno >= logging.WARNING] == []


HEADS = {
    "longer than 4096 bytes": b"POST /v1/enroll HTTP/1.1\r\nHost: x\r\nX-Long: " + b"secret" * 4000,
    "longer than 4096 bytes ": b"GET /" + b"secret" * 4000,
    "head is longer than 16384 bytes": b"GET / HTTP/1.1\r\n" + (b"X-secret: " + b"y" * 4000 + b"\r\n") * 10,
    "more than 128 fields": b"GET / HTTP/1.1\r\n" + b"X-secret: y\r\n" * 200 + b"\r\n",
    "no valid HTTP": b"GET / HTTP/1.1\r\nsecret\r\n\r\n",
    "does not begin with a method": b"\x16\x03secret\r\n\r\n",
    "Expect may ask for": b"GET /healthz HTTP/1.1\r\nHost: x\r\nExpect: secret\r\n\r\n",
}


@pytest.mark.parametrize("said", HEADS)
@pytest.mark.parametrize("listener", ["devices", "people"])
async def test_a_head_that_cannot_be_read_is_a_typed_refusal_that_repeats_none_of_it(
    place: Attacked, said: str, listener: str, caplog: pytest.LogCaptureFixture
) -> None:
    listening = place.server.listening
    url = URL(listening.url if listener == "devices" else listening.admin_url)
    refusals = place.server.service.metrics.refusals
    before = totals(refusals, "code")["malformed"]
    reader, writer = await asyncio.open_connection(url.host, url.port)
    writer.write(HEADS[said])
    async with asyncio.timeout(5):
        first, _, rest = (await reader.read()).partition(b"\r\n")
    writer.close()
    assert b" 400 " in first
    headers, _, body = rest.partition(b"\r\n\r\n")
    kind = MEDIA_TYPE if listener == "devices" else "application/json"
    assert f"Content-Type: {kind}".encode() in headers
    problem = Answer(400, {"Content-Type": kind}, body).problem
    assert problem.code is Code.MALFORMED
    assert said.strip() in problem.detail
    assert b"secret" not in rest
    assert caplog.records == []
    assert totals(refusals, "code")["malformed"] == before + 1


async def test_what_cannot_be_read_is_not_kept_until_garbage_is_collected(place: Attacked) -> None:
    gc.collect()
    gc.freeze()  # what is there already is neither looked through nor found
    gc.disable()
    try:
        reader, writer = await place.server.connect()
        writer.write(b"GET / HTTP/1.1\r\nX: " + b"x" * (1 << 20))
        with contextlib.suppress(ConnectionError):
            async with asyncio.timeout(5):
                await reader.read()
        writer.close()
        await asyncio.sleep(0.2)
        kept = [found for found in gc.get_objects() if issubclass(type(found), HttpProcessingError)]
    finally:
        gc.enable()
        gc.unfreeze()
    assert kept == []


@pytest.mark.parametrize(
    "path", ["/", "/v2/check-in", "/v1/leases/1/update", "/v1/../etc/passwd", "/v1/%ff", "//v1/check-in"]
)
async def test_a_path_that_is_not_there_is_a_typed_404(place: Attacked, path: str) -> None:
    refused(await place.server.raw("GET", path), Code.NOT_FOUND, "there is no GET", "here")


async def test_a_name_with_a_control_character_is_refused_before_the_ledger_is_asked(place: Attacked) -> None:
    for path in ("/devices?after=%00", "/tasks/%00", "/tasks/a%1F", "/tasks/t/rounds?limit=%7f"):
        refused(await place.server.people("GET", path), Code.MALFORMED, "control character")
    for path in ("/devices/%00/revoke", "/admin-tokens/%00/revoke", "/tasks/%00/pause"):
        refused(await place.server.people("POST", path), Code.MALFORMED, "control character")
    refused(await place.server.raw("GET", f"/v1/bundles/{NOBODY}/%00"), Code.MALFORMED, "control character")
    refused(await place.server.people("GET", "/tasks/%20"), Code.NOT_FOUND)


async def test_a_wrong_method_is_a_typed_405_that_names_the_right_one(place: Attacked) -> None:
    answer = await place.server.raw("GET", "/v1/enroll")
    refused(answer, Code.NOT_FOUND, "GET is not taken at /v1/enroll", "use POST", status=405)
    assert answer.headers["Allow"] == "POST"
