"""HttpTransport with a wrong clock, at the aggregator's own routes over real sockets."""

from __future__ import annotations

import asyncio
import math
from pathlib import Path
from typing import cast

import pytest
from aiohttp import web

from edge_client.http_transport import HttpTransport
from fedtt.errors import Refused, WireError
from fedtt.messages import (
    Code,
    Work,
)
from tests.support.clock import VirtualClock
from tests.unit.edge_client.test_http_transport import (
    CHECK_IN,
    Real,
    at_real_server,
    at_server,
    problem,
)


def test_a_wrong_clock_is_mended_by_the_servers_and_remembered(tmp_path: Path) -> None:
    offsets: list[float] = []
    slow = VirtualClock(start=1_000_000.0 - 5000)

    async def test(real: Real) -> None:
        assert isinstance(await real.transport.check_in(CHECK_IN), Work)
        assert offsets == [5000.0]
        await real.transport.check_in(CHECK_IN)
        assert len(offsets) == 1, "the second request was right at once"

    at_real_server(tmp_path, test, device_clock=slow, remember=offsets.append)


@pytest.mark.parametrize("wrong_s", [-7 * 86400.0, 7 * 86400.0])
def test_a_clock_that_is_a_week_wrong_serves_also_after_a_restart_and_after_it_was_set(
    wrong_s: float, tmp_path: Path
) -> None:
    offsets: list[float] = []

    async def test(real: Real) -> None:
        assert isinstance(await real.transport.check_in(CHECK_IN), Work)
        assert offsets == [-wrong_s]
        url = str(real.transport._base)
        real.clock._now += 1
        for clock_off_s in (wrong_s, 0.0):  # as it was, then set right
            device_clock = VirtualClock(start=real.clock.now() + clock_off_s)
            again = HttpTransport(url, real.identity, device_clock, clock_offset_s=-wrong_s)
            try:
                assert isinstance(await again.check_in(CHECK_IN), Work)
            finally:
                await again.close()
            real.clock._now += 1

    at_real_server(
        tmp_path, test, device_clock=VirtualClock(start=1_000_000.0 + wrong_s), remember=offsets.append
    )


@pytest.mark.parametrize("now", [math.nan, math.inf, -1.0, 1e11])
def test_a_time_that_is_none_moves_no_clock(now: float, tmp_path: Path) -> None:
    async def handler(_: web.Request) -> web.Response:
        return problem(Code.CLOCK_SKEW, status=401, now=now)

    async def test(transport: HttpTransport) -> None:
        with pytest.raises(WireError, match=r"now"):
            await transport.check_in(CHECK_IN)
        assert transport._offset_s == 0.0

    at_server(tmp_path, handler, test)


@pytest.mark.parametrize("offset_s", [math.nan, math.inf, -math.inf, 1e300])
def test_an_offset_that_is_none_is_mended_by_the_server(offset_s: float, tmp_path: Path) -> None:
    offsets: list[float] = []

    async def test(real: Real) -> None:
        real.transport._offset_s = offset_s
        real.clock._now += 1
        assert isinstance(await real.transport.check_in(CHECK_IN), Work)
        assert offsets == [0.0]

    at_real_server(tmp_path, test, remember=offsets.append)


def test_a_clock_the_server_will_not_have_either_way_is_a_refusal(tmp_path: Path) -> None:
    asked: list[str] = []

    async def handler(request: web.Request) -> web.Response:
        asked.append(request.path)
        return problem(Code.CLOCK_SKEW, status=401, now=5.0)

    async def test(transport: HttpTransport) -> None:
        with pytest.raises(Refused, match="clock_skew"):
            await transport.check_in(CHECK_IN)
        assert len(asked) == 2

    at_server(tmp_path, handler, test)


@pytest.mark.parametrize("status", [200, 400])
def test_an_answer_to_the_second_try_that_is_none_keeps_no_connection(status: int, tmp_path: Path) -> None:
    used: list[asyncio.Transport] = []

    async def handler(request: web.Request) -> web.StreamResponse:
        used.append(connection := cast("asyncio.Transport", request.transport))
        if len(used) % 2:
            return problem(Code.CLOCK_SKEW, status=401, now=5.0)
        headers = {"Content-Type": "text/html", "Content-Length": "9999"}
        page = web.StreamResponse(status=status, headers=headers)
        await page.prepare(request)
        while not connection.is_closing():  # nobody reads it to its end
            await asyncio.sleep(0.01)
        return page

    async def test(transport: HttpTransport) -> None:
        kept = []  # with its traceback, as a program may that shows it later
        for _ in range(3):
            with pytest.raises(WireError, match="not the protocol's") as caught:
                await transport.check_in(CHECK_IN)
            kept.append(caught.value)
        assert (len(kept), len(used)) == (3, 6)
        async with asyncio.timeout(2):
            while not all(connection.is_closing() for connection in used):
                await asyncio.sleep(0.01)

    at_server(tmp_path, handler, test)
