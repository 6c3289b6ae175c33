"""A device over real HTTP: what its check-ins weigh, and what the server keeps of it."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

from aggregator.metrics import totals
from edge_client.device_config import DeviceConfig
from edge_client.examples import ExampleStore
from edge_client.local_trainer import LocalTrainer
from edge_client.runtime import Runtimes
from edge_client.session import open_device
from tests.support.edge import MeanTarget
from tests.support.served import Served, served, task_text

ROUTE = "/v1/check-in"


async def bodies(server: Served, home: Path, examples: int, steps: int) -> list[int]:
    """Bytes of check-ins that each step of a device sent, as the server counts them."""
    counted, data = [0], ExampleStore(None)
    start = totals(server.service.metrics.received, "route").get(ROUTE, 0)
    for number in range(examples):
        data.add(f"lights {number}", number % 2)
    async with open_device(
        home,
        server=server.url,
        examples=data,
        config=DeviceConfig(token=server.token),
        trainer=LocalTrainer(Runtimes(lambda _: MeanTarget())),
    ) as device:
        await device.consent()
        for _ in range(steps):
            await device.step()
            counted.append(totals(server.service.metrics.received, "route").get(ROUTE, 0) - start)
    return [after - before for before, after in pairwise(counted)]


async def test_only_what_is_new_is_told_at_length(tmp_path: Path) -> None:
    async with served(tmp_path, task_text()) as server:
        home, full, short = tmp_path / "home", 83, 26
        # enrolled, granted, trained, acknowledged, and the next check-in
        assert await bodies(server, home, 5, 5) == [0, full, 0, 0, short]
        await bodies(server, home, 5, 3)
        assert sum(await bodies(server, home, 6, 1)) == short + full
        with server.service.store.reading() as tx:
            (row,) = tx.devices()
        assert (row.client, row.runtimes, row.examples) == ("fedtt-edge", ("onnxruntime",), 6)
        assert totals(server.service.metrics.check_ins, "answer")["tell"] == 1
        assert sum(totals(server.service.metrics.refusals, "code").values()) == 0
