"""Devices that share a cache of bundles: one's bundle goes while it works, and it has it anew."""

from __future__ import annotations

from pathlib import Path

import pytest

from aggregator.app import device_app
from edge_client.bundle_cache import BundleCache
from edge_client.device_config import DeviceConfig
from edge_client.events import Acknowledged, Event, Step
from edge_client.examples import Example, Shard
from edge_client.local_trainer import LocalTrainer
from edge_client.onnx_runtime import onnx_runtimes
from edge_client.session import open_device
from edge_client.trainer import LocalUpdate, TrainingRequest
from fedtt.optimiser import TrainingSpec
from fedtt.seams import SystemClock
from fedtt.task import RoundSpec, TaskSpec
from tests.conftest import TINY_LABELS
from tests.support.in_process import TOKEN, listening, memory_service

pytestmark = pytest.mark.slow

SPEC = TaskSpec(
    name="shared",
    rounds=RoundSpec(count=1, cohort=1),
    training=TrainingSpec(local_steps=2, batch_size=2),
)
EXAMPLES = Shard([Example(label, label) for label in TINY_LABELS])
ROOM_BYTES = 1 << 30


class Interrupted(LocalTrainer):
    """Before its first training something happens to the bundle, which was checked just before."""

    def __init__(self, cache: Path, name: str) -> None:
        super().__init__(onnx_runtimes())
        self._cache, self._name, self.requests = cache, name, 0

    async def train(self, request: TrainingRequest) -> LocalUpdate:
        self.requests += 1
        if self.requests == 1:
            if self._name == "all":  # another process needs the room
                other = BundleCache(self._cache, SystemClock(), limit_bytes=ROOM_BYTES)
                other._make_room("0" * 64, ROOM_BYTES, 0)
                assert not request.bundle.directory.exists()
            else:
                request.bundle.path(self._name).unlink()
        return await super().train(request)


@pytest.mark.parametrize("name", ["all", "step.onnx", "base.bin", "tokenizer.json"])
async def test_a_bundle_that_another_process_removes_between_check_and_use_is_downloaded_again(
    tmp_path: Path, tiny_bundle: Path, name: str
) -> None:
    seen, cache = list[Event](), tmp_path / "cache"
    trainer = Interrupted(cache, name)
    async with (
        memory_service(tmp_path / "blobs", SPEC, tiny_bundle, SystemClock()) as service,
        listening(device_app(service)) as url,
        open_device(
            tmp_path / "home",
            server=url,
            examples=EXAMPLES,
            config=DeviceConfig(token=TOKEN, retry_first_s=0.01),
            cache=cache,
            trainer=trainer,
            observe=seen.append,
        ) as device,
    ):
        await device.consent()
        await device.run(until=lambda step: isinstance(step, Acknowledged))
    kinds = [type(event).__name__ for event in seen if isinstance(event, Step)]
    assert kinds == ["Enrolled", "Granted", "Retrying", "Trained", "Acknowledged"]
    assert trainer.requests == 2
