"""A few real devices and the real service they train for, in one process and virtual time."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from aggregator import admin
from aggregator.service import Service
from aggregator.token_files import token_sha256
from edge_client import events
from edge_client.device import Device
from edge_client.device_config import DeviceConfig
from edge_client.examples import ExampleStore
from edge_client.runtime import Runtime
from fedtt.adapter import AdapterSpec, initial_theta
from fedtt.layout import Theta
from fedtt.manifest import MANIFEST, bundle_digest, decode_manifest
from fedtt.messages import Problem
from fedtt.task import TaskSpec, parse_task
from fedtt.wire import decode_theta
from storage.blobs import FileBlobs, load, save
from storage.memory import MemoryStore
from storage.records import MAIN, Bundle, Round, RoundState, Token, Version
from storage.store import Store
from tests.support.clock import VirtualClock
from tests.support.device_world import World
from tests.support.edge import locked_home
from tests.support.in_process import TOKEN
from tests.support.trains import TowardsMatrices, write_train_bundle

__all__ = ["Federation", "federation"]


class Federation:
    """Devices with data of their own, in homes of their own, and the server they train for."""

    def __init__(self, service: Service, spec: TaskSpec, adapter: AdapterSpec, worlds: list[World]) -> None:
        self.service, self.spec, self.adapter, self.worlds = service, spec, adapter, worlds
        self.devices: list[Device] = []

    async def round(self) -> None:
        """Every device takes part once, so that the round closes."""
        for device in self.devices:
            await device.run(until=lambda step: isinstance(step, events.Acknowledged))

    def ledger(self) -> tuple[list[Version], list[Round]]:
        """The main branch's versions, and the rounds that were folded, both from the first."""
        with self.service.store.reading() as tx:
            task = tx.task(self.spec.name)
            assert task is not None
            rounds = [r for r in tx.rounds(task.id)[::-1] if r.state is RoundState.FOLDED]
            return [v for v in tx.versions(task.id) if v.branch == MAIN], rounds

    def theta(self, version: Version, rank: int | None = None) -> Theta:
        layout = (self.adapter if rank is None else self.adapter.at_rank(rank)).layout
        return decode_theta(load(self.service.blobs, version.sha256), layout, version.sha256)


def _private_key(number: int) -> bytes:
    key = Ed25519PrivateKey.from_private_bytes(bytes([number]) * 32)
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


@asynccontextmanager
async def federation(
    tmp_path: Path,
    text: str,
    adapter: AdapterSpec,
    *,
    memory_mb: Sequence[int] = (0, 0, 0),
    label_epsilon: float = 0.0,
    runtime: Callable[[AdapterSpec], Runtime] = TowardsMatrices,
    store: Store | None = None,
    first: Theta | None = None,
    bundle: Path | None = None,
) -> AsyncIterator[Federation]:
    """A task on a bundle with these adapters and five labels, and a device for each entry of `memory_mb`.

    first: its factors; None for the spec's own first values.
    bundle: a real one with these adapters in its place.
    """
    clock = VirtualClock()
    service = Service(store or MemoryStore(), FileBlobs(tmp_path / "blobs"), clock)
    if bundle is None:
        bundle = tmp_path / "bundle"
        write_train_bundle(bundle, adapter, initial_theta(adapter, 0) if first is None else first)
    manifest = (bundle / MANIFEST).read_bytes()
    digest = bundle_digest(manifest)
    for name in decode_manifest(manifest).files:
        save(service.blobs, (bundle / name).read_bytes())
    with service.store.transaction() as tx:
        tx.put_token(Token(sha256=token_sha256(TOKEN), uses_left=None, expires_at=None))
        tx.put_bundle(Bundle(sha256=digest, manifest=manifest, added_at=clock.now()))
    service.writer.start()
    async with AsyncExitStack() as stack:
        stack.push_async_callback(service.writer.stop)
        answer = await admin.create_task(service, text, digest)
        assert not isinstance(answer, Problem), answer
        fleet = Federation(service, parse_task(text), adapter, [])
        for number, memory in enumerate(memory_mb):
            home = stack.enter_context(locked_home(tmp_path / f"device-{number}"))
            world = World(service, home, clock)
            world.key = _private_key(number + 1)
            world.runtime = runtime(adapter)
            world.examples = ExampleStore(None)
            for row in range(4):  # each device has labels of its own
                world.examples.add(f"lights {row}", (number * 2 + row % 2) % 5)
            fleet.worlds.append(world)
            config = DeviceConfig(token=TOKEN, memory_mb=memory, label_epsilon=label_epsilon)
            fleet.devices.append(world.device(config=config)[0])
        yield fleet
