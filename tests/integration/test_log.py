"""What the server logs, and how a line is found from an answer."""

from __future__ import annotations

import asyncio
import json
import signal
import sys
from pathlib import Path

import aiohttp

from fedtt.messages import Code
from tests.support.served import refused, served, task_text


async def test_an_answer_names_its_request_and_takes_a_proxys_name_for_it(tmp_path: Path) -> None:
    async with served(tmp_path, task_text()) as server:
        plain = await server.raw("GET", "/healthz")
        again = await server.raw("GET", "/healthz")
        assert plain.headers["X-Request-ID"] != again.headers["X-Request-ID"]
        named = await server.raw("GET", "/nothing", None, {"X-Request-ID": "proxy-17"})
        assert named.headers["X-Request-ID"] == "proxy-17"
        refused(named, Code.NOT_FOUND)
        for bad in ("x" * 65, "a b", "\x22"):
            answer = await server.raw("GET", "/healthz", None, {"X-Request-ID": bad})
            assert answer.headers["X-Request-ID"] != bad
        assert "X-Request-ID" in (await server.people("GET", "/tasks")).headers


async def test_a_line_of_the_log_is_json_with_the_request_it_is_about(tmp_path: Path) -> None:
    server = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "fedtt", "serve", "--data", str(tmp_path / "data"), "--port", "0",
        "--admin-port", "0", "--log-json", "--json", "--drain-s", "0.2",
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    assert server.stdout is not None
    listening = json.loads(await server.stdout.readline())
    token = Path(listening["admin_token_file"]).read_text().strip()
    (tmp_path / "data" / "blobs").rename(tmp_path / "data" / "away")
    async with aiohttp.ClientSession(headers={"Authorization": f"Bearer {token}"}) as session:
        url = f"{listening['admin_url']}/v1/admin/blobs/{'0' * 64}"
        async with session.put(url, data=b"x", headers={"X-Request-ID": "find-me"}) as answer:
            assert answer.status == 503
    server.send_signal(signal.SIGTERM)
    _, said = await server.communicate()
    assert server.returncode == 0
    lines = [json.loads(line) for line in said.decode().splitlines()]
    (line,) = [line for line in lines if line.get("request") == "find-me"]
    assert line["level"] == "error"
    assert f"/v1/admin/blobs/{'0' * 64} failed" in line["message"]
