"""Versions over real sockets: a device that keeps the last one downloads less and trains on the same bits."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path

import pytest

from edge_client import events
from edge_client.device_config import DeviceConfig
from edge_client.examples import ExampleStore
from edge_client.http_transport import Traffic
from edge_client.session import open_device
from fedtt.manifest import MANIFEST, decode_manifest
from fedtt.messages import DIFFERENCE_MEDIA_TYPE, Code
from storage.blobs import load
from tests.support.served import Served, refused, served, task_text, until

ROUNDS = 3
TASK = f"""
name = "tiny"
[rounds]
count = {ROUNDS}
cohort = 2
retry_s = 0.05
[training]
local_steps = 5
batch_size = 4
"""
SAID = {"set the alarm for seven": 0, "lights off please": 1, "pay my card": 2, "weather today": 3}


class Participant:
    """A device that takes part to the end; one that does not keep versions has them taken away each time."""

    def __init__(self, home: Path, *, keeps: bool) -> None:
        self.home, self._keeps = home, keeps
        self.traffic, self.first_bytes = Traffic(), 0

    async def live(self, server: Served) -> None:
        examples = ExampleStore(None)
        for sentence, label in SAID.items():
            examples.add(sentence, label)
        async with open_device(
            self.home,
            server=server.url,
            examples=examples,
            config=DeviceConfig(token=server.token),
            traffic=self.traffic,
            observe=self._observe,
        ) as device:
            await device.consent()
            await device.run(lambda step: isinstance(step, events.Waiting) and "no task" in step.reason)

    def _observe(self, event: events.Event) -> None:
        assert not isinstance(event, events.GaveUp | events.Retrying | events.Dropped), event
        if isinstance(event, events.Trained) and not self.first_bytes:
            self.first_bytes = self.traffic.version_bytes
        if isinstance(event, events.Granted) and not self._keeps:
            shutil.rmtree(self.home / "versions", ignore_errors=True)

    def held(self) -> bytes:
        (file,) = (self.home / "versions").iterdir()
        return file.read_bytes()


@pytest.mark.slow
async def test_from_the_second_round_on_a_device_that_keeps_its_version_downloads_less(
    tmp_path: Path, tiny_bundle: Path
) -> None:
    thrifty = Participant(tmp_path / "thrifty", keeps=True)
    careless = Participant(tmp_path / "careless", keeps=False)
    async with served(tmp_path) as server:
        await server.admin.create_task(TASK, await server.admin.send_bundle(tiny_bundle))
        async with asyncio.timeout(60):
            await asyncio.gather(thrifty.live(server), careless.live(server))
        *_, last_trained, _ = await server.admin.task("tiny", "/versions")
        assert last_trained["number"] == ROUNDS - 1
        trained_on = load(server.service.blobs, last_trained["sha256"])
    manifest = decode_manifest((tiny_bundle / MANIFEST).read_bytes())
    whole_bytes = 4 * manifest.adapter.layout.size
    # who holds nothing is taken to hold zeros, of which the first version has many
    assert careless.first_bytes == thrifty.first_bytes < whole_bytes
    later_bytes, without_bytes = (p.traffic.version_bytes - p.first_bytes for p in (thrifty, careless))
    assert 0 < later_bytes < without_bytes <= (ROUNDS - 1) * whole_bytes
    assert later_bytes < 0.85 * (ROUNDS - 1) * whole_bytes
    assert thrifty.held() == careless.held() == trained_on


async def test_which_of_the_two_an_answer_is_stands_in_its_media_type(tmp_path: Path) -> None:
    async with served(tmp_path, task_text(cohort=1)) as server, server.device() as peer:
        await peer.update()

        async def folded() -> list[str]:
            rows = await server.admin.task("lights", "/versions")
            return [row["sha256"] for row in rows] if len(rows) == 2 else []

        old, new = await until(folded)
        whole = await peer.request("GET", f"/v1/versions/{new}")
        difference = await peer.request("GET", f"/v1/versions/{new}", query=f"from={old}")
        assert whole.headers["Content-Type"] == "application/octet-stream"
        assert difference.headers["Content-Type"] == DIFFERENCE_MEDIA_TYPE
        assert len(difference.body) < len(whole.body)
        for answer in (whole, difference):
            assert answer.headers["Cache-Control"] == "private, max-age=31536000, immutable"
        answer = await peer.request("GET", f"/v1/versions/{new}", query="from=../../fedtt.db")
        refused(answer, Code.MALFORMED, "from='../../fedtt.db' names no version")
