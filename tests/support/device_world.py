"""A server, a device directory, and devices that are built on it again and again."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from aggregator.service import Service
from edge_client import events
from edge_client.bundle_cache import BundleCache
from edge_client.conditions import Conditions
from edge_client.device import Device
from edge_client.device_config import DeviceConfig
from edge_client.events import Event, Step
from edge_client.examples import ExampleStore
from edge_client.files import write_atomically
from edge_client.home import Home
from edge_client.identity import Identity
from edge_client.journal import Journal
from edge_client.local_trainer import LocalTrainer
from edge_client.runtime import Runtime, Runtimes
from edge_client.version_cache import FileVersions
from fedtt.codec import CodecSpec
from fedtt.errors import Refused
from fedtt.messages import (
    AsTold,
    CheckIn,
    CheckInAnswer,
    Code,
    Enroll,
    Enrolled,
    Failure,
    Problem,
    Receipt,
    Verdict,
)
from fedtt.optimiser import TrainingSpec
from fedtt.seams import Transport, VersionBody
from fedtt.task import RoundSpec, TaskSpec
from storage.records import MAIN, Lease
from tests.support.clock import VirtualClock
from tests.support.edge import MeanTarget, locked_home, write_small_bundle
from tests.support.in_process import TOKEN, InProcess, memory_service

__all__ = [
    "ROUNDS",
    "SPEC",
    "Hook",
    "Hooked",
    "World",
    "acknowledged",
    "device_world",
    "failing",
    "granted",
    "in_world",
    "lease_of",
    "no_hook",
    "refusal",
    "trained",
]

ROUNDS = 3
SPEC = TaskSpec(
    name="lights",
    rounds=RoundSpec(count=ROUNDS, cohort=1, deadline_s=1000, retry_s=10),
    seed=3,
    training=TrainingSpec(local_steps=2, batch_size=2),
    codec=CodecSpec(quantise="int4", error_feedback=True),
)

#: The same device in every world, so that two lives can be compared to the bit.
KEY = Ed25519PrivateKey.from_private_bytes(bytes(32)).private_bytes(
    Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()
)

Hook = Callable[[str], None]


def no_hook(_: str) -> None:
    """Nothing happens."""


class Hooked:
    """A transport that calls `before` and `after` round every call, and keeps what was uploaded."""

    def __init__(self, inner: Transport, before: Hook = no_hook, after: Hook = no_hook) -> None:
        self._inner, self._before, self._after = inner, before, after
        self.calls: list[str] = []
        self.check_ins: list[CheckIn | AsTold] = []
        self.frames: list[tuple[str, bytes]] = []
        self.failures: list[Failure] = []

    async def enroll(self, message: Enroll) -> Enrolled:
        found: Enrolled = await self._call("enroll", self._inner.enroll(message))
        return found

    async def check_in(self, message: CheckIn | AsTold) -> CheckInAnswer:
        self.check_ins.append(message)
        found: CheckInAnswer = await self._call("check_in", self._inner.check_in(message))
        return found

    async def bundle_file(self, bundle: str, name: str, offset: int) -> AsyncGenerator[bytes, None]:
        self.calls.append("bundle_file")
        self._before("bundle_file")
        async for piece in self._inner.bundle_file(bundle, name, offset):
            yield piece
            self._after("bundle_file")

    async def version(self, sha256: str, limit_bytes: int, held: str | None = None) -> VersionBody:
        found: VersionBody = await self._call("version", self._inner.version(sha256, limit_bytes, held))
        return found

    async def upload(self, lease: str, frame: bytes) -> Receipt:
        self.frames.append((lease, frame))
        found: Receipt = await self._call("upload", self._inner.upload(lease, frame))
        return found

    async def receipt(self, lease: str) -> Receipt:
        found: Receipt = await self._call("receipt", self._inner.receipt(lease))
        return found

    async def judge(self, lease: str, verdict: Verdict) -> None:
        await self._call("judge", self._inner.judge(lease, verdict))

    async def fail(self, lease: str, failure: Failure) -> None:
        self.failures.append(failure)
        await self._call("fail", self._inner.fail(lease, failure))

    async def leave(self, *, erase: bool) -> None:
        await self._call("leave", self._inner.leave(erase=erase))

    async def close(self) -> None:
        await self._inner.close()

    async def _call(self, name: str, answer: Any) -> Any:
        self.calls.append(name)
        try:
            self._before(name)
        except BaseException:
            answer.close()
            raise
        found = await answer
        self._after(name)
        return found


class World:
    """One server, one device directory, and devices that are built on it again and again."""

    def __init__(self, service: Service, home: Home, clock: VirtualClock) -> None:
        self.service, self.home, self.clock = service, home, clock
        self.key = KEY
        self.seen: list[Event] = []
        self.transports: list[Hooked] = []
        self.runtime: Runtime = MeanTarget()
        self.examples = ExampleStore(None)
        for number in range(5):
            self.examples.add(f"lights {number}", number % 2)

    def device(
        self,
        before: Hook = no_hook,
        after: Hook = no_hook,
        *,
        consent: bool = True,
        config: DeviceConfig | None = None,
        conditions: Conditions | None = None,
    ) -> tuple[Device, Hooked]:
        journal = Journal(self.home)
        if not self.home.key.exists():
            write_atomically(self.home.key, self.key)
        identity = Identity.open(self.home)
        transport = Hooked(InProcess(self.service, identity.device), before, after)
        self.transports.append(transport)
        device = Device(
            config or DeviceConfig(token=TOKEN),
            public_key=identity.public_key,
            journal=journal,
            transport=transport,
            examples=self.examples,
            bundles=BundleCache(self.home.bundles, self.clock),
            versions=FileVersions(self.home.versions),
            trainer=LocalTrainer(Runtimes(lambda bundle: self.runtime)),
            conditions=conditions,
            clock=self.clock,
            observe=self.seen.append,
        )
        if consent and journal.state.consented_at is None:
            journal.update(consented_at=self.clock.now())
        return device, transport

    def kinds(self) -> list[str]:
        """The names of the steps taken so far, on all devices built here."""
        return [type(event).__name__ for event in self.seen if isinstance(event, Step)]

    def version(self) -> tuple[int, str]:
        with self.service.store.reading() as tx:
            task = tx.task(SPEC.name)
            assert task is not None
            latest = tx.latest_version(task.id, MAIN)
            assert latest is not None
            return latest.number, latest.sha256


@asynccontextmanager
async def device_world(
    tmp_path: Path, spec: TaskSpec = SPEC, tokenizer_file: bytes | None = None
) -> AsyncIterator[World]:
    clock = VirtualClock()
    write_small_bundle(tmp_path / "bundle", base_bytes=250_000, tokenizer_file=tokenizer_file)
    ids = iter(range(1, 1000))
    with locked_home(tmp_path / "home") as home:
        async with memory_service(tmp_path / "blobs", spec, tmp_path / "bundle", clock) as service:
            service.coordinator._new_lease_id = lambda: f"{next(ids):032x}"
            yield World(service, home, clock)


def in_world(
    tmp_path: Path,
    test: Callable[[World], Awaitable[None]],
    spec: TaskSpec = SPEC,
    tokenizer_file: bytes | None = None,
) -> None:
    async def run() -> None:
        async with device_world(tmp_path, spec, tokenizer_file) as world:
            await test(world)

    asyncio.run(run())


def acknowledged(step: Step) -> bool:
    return isinstance(step, events.Acknowledged)


def trained(step: Step) -> bool:
    return isinstance(step, events.Trained)


def granted(step: Step) -> bool:
    return isinstance(step, events.Granted)


def failing(error: Exception, name: str, times: int = 1) -> Hook:
    """A hook that fails the first calls of a name."""
    left = [error] * times

    def hook(called: str) -> None:
        if called == name and left:
            raise left.pop()

    return hook


def refusal(code: Code, retry_after_s: float | None = None) -> Refused:
    return Refused(Problem(code=code, detail="no"), retry_after_s)


def lease_of(world: World, lease: str) -> Lease:
    with world.service.store.reading() as tx:
        found = tx.lease(lease)
    assert found is not None
    return found
