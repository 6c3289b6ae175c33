"""A server process that writes its log as JSON, and one call of it that fails."""

from __future__ import annotations

import asyncio
import json
import signal
import sys
from pathlib import Path
from typing import Any

import aiohttp

__all__ = ["REQUEST_ID", "lines_of_a_failure"]

REQUEST_ID = "find-me"


async def lines_of_a_failure(directory: Path, env: dict[str, str] | None = None) -> list[dict[str, Any]]:
    """What the log says of that call; the server has ended, cleanly."""
    server = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "fedtt", "serve", "--data", str(directory / "data"), "--port", "0",
        "--admin-port", "0", "--log-json", "--json", "--drain-s", "0.2",
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE, env=env,
    )  # fmt: skip
    assert server.stdout is not None
    listening = json.loads(await server.stdout.readline())
    token = Path(listening["admin_token_file"]).read_text().strip()
    (directory / "data" / "blobs").rename(directory / "data" / "away")
    async with aiohttp.ClientSession(headers={"Authorization": f"Bearer {token}"}) as session:
        url = f"{listening['admin_url']}/v1/admin/blobs/{'0' * 64}"
        async with session.put(url, data=b"x", headers={"X-Request-ID": REQUEST_ID}) as answer:
            assert answer.status == 503
    server.send_signal(signal.SIGTERM)
    _, said = await server.communicate()
    assert server.returncode == 0, said
    lines = [json.loads(line) for line in said.decode().splitlines()]
    return [line for line in lines if line.get("request") == REQUEST_ID]
