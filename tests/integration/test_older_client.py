"""The client of an earlier release, as it was, on the server of this one: see `older/README.md`."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
import zipfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from storage.records import DeviceState, UpdateState
from tests.support.served import Served, served, until

pytestmark = pytest.mark.slow

ARCHIVE = next((Path(__file__).parent / "older").glob("client-*.zip"))
#: its own part of the `fedtt` command alone: the server's and the exporter's here are of another release
COMMAND = """
import argparse, pathlib, sys
import edge_client, edge_client.cli, fedtt
from fedtt.errors import FedttError

for package in (edge_client, fedtt):
    assert pathlib.Path(package.__file__).is_relative_to(sys.argv[1]), package.__file__
parser = argparse.ArgumentParser()
edge_client.cli.register(parser.add_subparsers(required=True))
args = parser.parse_args(sys.argv[2:])
try:
    sys.exit(args.run(args) or 0)
except FedttError as error:
    sys.exit(f"fedtt: error: {error}")
"""
TASK = """
name = "tiny"
[rounds]
count = 2
cohort = 1
retry_s = 0.1
[training]
local_steps = 3
batch_size = 2
[codec]
quantise = "ternary"
coding = "range"
error_feedback = true
"""
ROWS = (
    {"text": "set the alarm for seven", "label": "alarm"},
    {"text": "lights off please", "label": "lights off"},
    {"text": "pay my card", "label": 2},
)


class OlderClient:
    """`fedtt client …` of then."""

    def __init__(self, directory: Path, server: Served) -> None:
        self._code, self._home, self._server = directory / "code", directory / "home", server
        self._rows = directory / "rows.jsonl"
        self._rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
        with zipfile.ZipFile(ARCHIVE) as archive:
            archive.extractall(self._code)

    async def run(self, *arguments: str) -> tuple[int | None, list[dict[str, Any]], str]:
        """Exit status, what it printed as JSON, and its errors."""
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", COMMAND, str(self._code)),
            *("client", *arguments, "--home", str(self._home), "--json"),
            cwd=self._code,
            env=os.environ | {"PYTHONPATH": str(self._code)},
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        try:
            async with asyncio.timeout(60):
                out, err = await process.communicate()
        finally:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
        return process.returncode, [json.loads(line) for line in out.splitlines()], err.decode()

    async def take_part(self) -> list[str]:
        server = ("--server", self._server.url, "--token", self._server.token)
        status, events, err = await self.run("run", *server, "--data", str(self._rows), "--yes", "--once")
        assert status == 0, err
        return [event["event"] for event in events if "download" not in event["event"]]


@asynccontextmanager
async def a_task(directory: Path, bundle: Path) -> AsyncIterator[Served]:
    async with served(directory) as server:
        await server.admin.create_task(TASK, await server.admin.send_bundle(bundle))
        yield server


async def version(server: Served, number: int) -> None:
    """Wait until it is there."""

    async def is_there() -> bool:
        return bool((await server.admin.task("tiny"))["version"] == number)

    await until(is_there, 30)


async def test_it_takes_part_round_after_round_and_is_forgotten(tmp_path: Path, tiny_bundle: Path) -> None:
    async with a_task(tmp_path, tiny_bundle) as server:
        client = OlderClient(tmp_path, server)
        assert await client.take_part() == ["enrolled", "granted", "trained", "acknowledged", "ended"]
        await version(server, 1)
        assert await client.take_part() == ["granted", "trained", "acknowledged", "ended"]
        await version(server, 2)
        status, (found,), _ = await client.run("status")
        assert (status, found["acknowledged"]) == (0, 2)
        with server.service.store.reading() as tx:
            (device,) = tx.devices()
            updates = tx.updates_of(device.id, UpdateState.FOLDED)
        assert [update.folded_into for update in updates] == [1, 2]
        assert (await server.admin.task("tiny"))["state"] == "finished"
        status, (said,), _ = await client.run("forget")
        assert (status, said) == (0, {"forgotten": True, "server_asked": True})
        with server.service.store.reading() as tx:
            (device,) = tx.devices()
        assert device.state is DeviceState.ERASED


async def test_a_refusal_reaches_it_in_words(tmp_path: Path, tiny_bundle: Path) -> None:
    async with a_task(tmp_path, tiny_bundle) as server:
        client = OlderClient(tmp_path, server)
        wrong = ("--server", server.url, "--token", "wrong", "--data", str(tmp_path / "rows.jsonl"))
        status, _, err = await client.run("run", *wrong, "--yes", "--once")
    assert status != 0
    assert err.splitlines()[-1].startswith("fedtt: error: bad_token: ")
    assert "Traceback" not in err
