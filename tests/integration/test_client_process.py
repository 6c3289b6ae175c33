"""The client as a process of its own, with the real ONNX graph, against the aggregator over HTTP."""

from __future__ import annotations

import asyncio
import json
import signal
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from aggregator.app import device_app
from aggregator.service import Service
from fedtt.codec import CodecSpec
from fedtt.optimiser import TrainingSpec
from fedtt.seams import SystemClock
from fedtt.task import RoundSpec, TaskSpec
from storage.records import DeviceState, UpdateState
from tests.support.in_process import TOKEN, listening, memory_service

pytestmark = pytest.mark.slow

SPEC = TaskSpec(
    name="tiny",
    rounds=RoundSpec(count=1, cohort=1),
    training=TrainingSpec(local_steps=3, batch_size=2),
    codec=CodecSpec(quantise="ternary", coding="range", error_feedback=True),
)
ROWS = [
    {"text": "set the alarm for seven", "label": "alarm"},
    {"text": "lights off please", "label": "lights off"},
    {"text": "pay my card", "label": 2},
    {"text": "weather today " * 20, "label": "weather"},
]


class Client:
    """Starts `fedtt client …` on one home."""

    def __init__(self, home: Path, url: str, data: Path, service: Service) -> None:
        self.home, self.url, self.data, self.service = home, url, data, service

    async def start(self, *arguments: str) -> asyncio.subprocess.Process:
        return await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "fedtt", "client", *arguments, "--home", str(self.home), "--json"),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )

    async def take_part(self, *more: str) -> asyncio.subprocess.Process:
        run = ("run", "--server", self.url, "--token", TOKEN, "--data", str(self.data), "--yes")
        return await self.start(*run, *more)

    async def until(self, process: asyncio.subprocess.Process, event: str) -> dict[str, Any]:
        assert process.stdout is not None
        async with asyncio.timeout(30):
            while line := await process.stdout.readline():
                found: dict[str, Any] = json.loads(line)
                if found["event"] == event:
                    return found
        raise AssertionError(f"the client ended without {event}")

    async def command(self, *arguments: str) -> tuple[int | None, dict[str, Any]]:
        process = await self.start(*arguments)
        out, err = await process.communicate()
        return process.returncode, json.loads(out) if out else {"error": err.decode()}


def with_client(tmp_path: Path, bundle: Path, test: Callable[[Client], Awaitable[None]]) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))

    async def run() -> None:
        async with (
            memory_service(tmp_path / "blobs", SPEC, bundle, SystemClock()) as service,
            listening(device_app(service)) as url,
        ):
            await test(Client(tmp_path / "home", url, data, service))

    asyncio.run(run())


def test_one_participation_from_nothing_to_an_acknowledged_update(tmp_path: Path, tiny_bundle: Path) -> None:
    async def test(client: Client) -> None:
        process = await client.take_part("--once")
        out, _ = await process.communicate()
        events = [json.loads(line) for line in out.splitlines()]
        assert process.returncode == 0
        steps = [e["event"] for e in events if "download" not in e["event"]]
        assert steps == ["enrolled", "granted", "trained", "acknowledged", "ended"]
        trained = next(e for e in events if e["event"] == "trained")
        assert (trained["examples"], trained["steps"]) == (4, 3)
        assert trained["cut_texts"] >= 1
        status, found = await client.command("status")
        assert status == 0
        assert (found["acknowledged"], found["phase"], found["running"]) == (1, "idle", False)
        assert found["last_receipt"]["state"] == UpdateState.ACCEPTED.value
        assert found["residual_bytes"] > 0

    with_client(tmp_path, tiny_bundle, test)


@pytest.mark.parametrize(
    ("how", "background"), [(signal.SIGTERM, False), (signal.SIGTERM, True), (signal.SIGINT, False)]
)
def test_a_client_that_is_told_to_stop_says_so_and_can_go_on(
    tmp_path: Path, tiny_bundle: Path, how: signal.Signals, background: bool
) -> None:
    async def test(client: Client) -> None:
        before = signal.getsignal(signal.SIGINT)
        if background:  # a shell without job control has what it starts there ignore Ctrl-C
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            process = await client.take_part()
        finally:
            signal.signal(signal.SIGINT, before)
        await client.until(process, "waiting")
        process.send_signal(how)
        out, err = await process.communicate()
        assert process.returncode == 130
        assert json.loads(out.splitlines()[-1])["event"] == "ended"
        assert err.decode().endswith("fedtt: stopped\n")
        again = await client.take_part("--once")
        assert await client.until(again, "waiting")
        await again.communicate()
        assert again.returncode == 0

    with_client(tmp_path, tiny_bundle, test)


def test_a_client_killed_outright_goes_on_under_the_same_lease(tmp_path: Path, tiny_bundle: Path) -> None:
    async def test(client: Client) -> None:
        process = await client.take_part()
        granted = await client.until(process, "granted")
        process.kill()
        await process.communicate()
        again = await client.take_part("--once")
        acknowledged = await client.until(again, "acknowledged")
        await again.communicate()
        assert acknowledged["receipt"]["lease"] == granted["lease"]

    with_client(tmp_path, tiny_bundle, test)


def test_the_owner_rules_a_running_client_from_another_terminal(tmp_path: Path, tiny_bundle: Path) -> None:
    async def test(client: Client) -> None:
        process = await client.take_part()
        await client.until(process, "waiting")
        assert await client.command("pause") == (0, {"paused": True})
        await client.until(process, "paused")
        assert (await client.command("status"))[1]["running"] is True
        assert await client.command("resume") == (0, {"paused": False})
        await client.until(process, "waiting")
        status, answer = await client.command("run", "--server", client.url, "--once")
        assert status == 2
        assert "another client is running" in answer.get("error", "")
        assert await client.command("forget") == (0, {"forgotten": True, "server_asked": True})
        await process.communicate()
        assert process.returncode == 0
        assert not client.home.exists()
        with client.service.store.reading() as tx:
            assert [device.state for device in tx.devices()] == [DeviceState.ERASED]

    with_client(tmp_path, tiny_bundle, test)
