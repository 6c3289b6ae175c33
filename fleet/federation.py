"""A whole federation on this machine: a server process, and devices that reach it over loopback HTTP.

The devices are the client's own code with homes, keys and journals of their own; they share one copy of
the frozen base in memory and a few threads to train on, as a laptop must.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import AsyncIterator, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from aggregator.admin_client import AdminClient
from edge_client import events
from edge_client.device_config import DeviceConfig
from edge_client.examples import Shard
from edge_client.http_transport import Traffic
from edge_client.local_trainer import LocalTrainer
from edge_client.onnx_runtime import onnx_runtimes
from edge_client.session import open_device
from fedtt.errors import FedttError
from fedtt.task import TaskSpec, parse_task

__all__ = ["Counts", "Server", "federate", "server_process"]

_POLL_S = 0.25
_START_S = 60.0


@dataclass(frozen=True)
class Server:
    """A started server process."""

    url: str
    admin_url: str
    admin_token: str
    enrolment_token: str


@dataclass
class Counts:
    """What the devices did and what travelled."""

    participations: int = 0  #: updates trained and sent, also those that came too late for their round
    acknowledged: int = 0  #: of them
    frame_bytes: int = 0  #: of them all
    steps: int = 0
    traffic: Traffic = field(default_factory=Traffic)  #: of all of them, while they live
    errors: list[str] = field(default_factory=list)

    @property
    def downlink_bytes(self) -> int:
        """Versions, plans and other answers; bundles apart."""
        return self.traffic.received_bytes - self.traffic.bundle_bytes

    def observe(self, event: events.Event) -> None:
        match event:
            case events.Trained():
                self.participations += 1
                self.frame_bytes += event.frame_bytes
                self.steps += event.steps
            case events.Acknowledged():
                self.acknowledged += 1
            case events.GaveUp():
                self.errors.append(event.detail)
            case events.Retrying():
                self.errors.append(event.error)
            case _:
                pass


@asynccontextmanager
async def server_process(data: Path) -> AsyncIterator[Server]:
    """`fedtt serve` on free ports over a data directory; ended (SIGTERM) when the block is left."""
    arguments = ("-m", "fedtt", "serve", "--json", "--data", str(data), "--port", "0", "--admin-port", "0")
    data.mkdir(parents=True, exist_ok=True)
    with (data / "server.log").open("ab") as log:
        process = await asyncio.create_subprocess_exec(
            sys.executable, *arguments, stdout=asyncio.subprocess.PIPE, stderr=log, start_new_session=True
        )
    try:
        assert process.stdout is not None  # noqa: S101  # asked for above
        try:
            async with asyncio.timeout(_START_S):
                line = await process.stdout.readline()
        except TimeoutError:
            line = b""
        if not line:
            raise FedttError(f"the server did not start within {_START_S:.0f} s: see {data / 'server.log'}")
        said: dict[str, str] = msgspec.json.decode(line)
        token = await asyncio.to_thread(Path(said["admin_token_file"]).read_text)
        yield Server(said["url"], said["admin_url"], token.strip(), said["enrolment_token"])
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        await process.wait()


async def federate(
    *,
    server: Server,
    run_directory: Path,
    bundle: Path,
    task_text: str,
    shards: Mapping[str, Shard],
    on_version: Callable[[AdminClient, dict[str, Any], Counts], Any],
    threads: int = 2,
) -> Counts:
    """Create the task, run all devices until it is finished, and hand each new version to `on_version`.

    shards: device name -> its data. threads: how many devices train at the same time.
    Raises FedttError with the reason where the task ends without being finished.
    """
    spec, counts = parse_task(task_text), Counts()
    async with AdminClient(server.admin_url, server.admin_token) as admin:
        digest = await admin.send_bundle(bundle)
        await admin.create_task(task_text, digest)
        watcher = asyncio.create_task(_watch(admin, spec, counts, on_version))
        with ThreadPoolExecutor(threads, thread_name_prefix="fedtt-trainer") as executor:
            devices = asyncio.create_task(_run_devices(server, run_directory, shards, counts, executor))
            try:
                await asyncio.wait([watcher, devices], return_when=asyncio.FIRST_COMPLETED)
                if not watcher.done():
                    devices.result()  # devices never end by themselves unless something is wrong
                    raise FedttError("the devices ended before the task was finished")
                watcher.result()
            finally:
                for task in (watcher, devices):
                    task.cancel()
                await asyncio.wait([watcher, devices])
    return counts


async def _run_devices(
    server: Server,
    directory: Path,
    shards: Mapping[str, Shard],
    counts: Counts,
    executor: ThreadPoolExecutor,
) -> None:
    trainer = LocalTrainer(onnx_runtimes(), executor)
    config = DeviceConfig(token=server.enrolment_token, client="fedtt-fleet", retry_limit_s=5.0)

    async def live(name: str, shard: Shard) -> None:
        async with open_device(
            directory / "devices" / name,
            server=server.url,
            examples=shard,
            config=config,
            cache=directory / "bundles",
            trainer=trainer,
            traffic=counts.traffic,
            observe=counts.observe,
        ) as device:
            await device.consent()
            await device.run()

    async with asyncio.TaskGroup() as group:
        for name, shard in shards.items():
            group.create_task(live(name, shard))


async def _watch(
    admin: AdminClient,
    spec: TaskSpec,
    counts: Counts,
    on_version: Callable[[AdminClient, dict[str, Any], Counts], Any],
) -> None:
    """Hand on every version in order, the first one too, until the task has ended."""
    seen = 0
    while True:
        task = await admin.rows(f"/tasks/{spec.name}")
        versions = await admin.rows(f"/tasks/{spec.name}/versions")
        for version in versions[seen:]:
            await on_version(admin, version, counts)
        seen = len(versions)
        if task["state"] == "finished":
            return
        if task["state"] != "active":
            raise FedttError(f"task {spec.name} is {task['state']}: {task['reason']}")
        await asyncio.sleep(_POLL_S)
