"""What `fedtt serve` lets in is set by its options."""

from __future__ import annotations

import asyncio
from pathlib import Path

import aiohttp
import pytest

from benchmarks.faults.server import ServerProcess
from fedtt.cli import main

LIMITS = ("--behind-proxy", "--address-rate", "0.01:2", "--device-rate", "none", "--max-connections", "3")


async def test_a_server_process_keeps_the_limits_it_was_given(tmp_path: Path) -> None:
    server = ServerProcess(tmp_path / "data", options=LIMITS)
    headers = {"X-Forwarded-For": "198.51.100.7"}
    async with server.running(), aiohttp.ClientSession(headers=headers) as session:
        statuses = []
        for _ in range(3):
            async with session.get(server.url + "/healthz") as answer:
                statuses.append(answer.status)
        assert statuses == [200, 200, 429]
    async with server.running():
        kept = [await asyncio.open_connection("127.0.0.1", server.port) for _ in range(3)]
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        try:
            async with asyncio.timeout(5):
                assert await reader.read(1) == b""
        except ConnectionError:
            pass  # closed as well
        for _, opened in (*kept, (reader, writer)):
            opened.close()


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("--device-rate", "fast", "'fast' is no number above 0"),
        ("--device-rate", "5:0", "'0' is no whole number from 1"),
        ("--address-rate", "-1", "'-1' is no number above 0"),
        ("--address-rate", "nan", "'nan' is no number above 0"),
        ("--max-connections", "none", "'none' is no whole number from 1"),
        ("--max-connections-per-range", "1.5", "'1.5' is no whole number from 1"),
        ("--body-s", "0", "'0' is no number above 0"),
    ],
)
def test_a_limit_that_is_none_is_refused_with_the_usage(
    capsys: pytest.CaptureFixture[str], option: str, value: str, said: str
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["serve", option, value])
    assert caught.value.code == 2
    assert f"argument {option}: {said}" in capsys.readouterr().err.splitlines()[-1]
