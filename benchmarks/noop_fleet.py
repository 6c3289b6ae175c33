"""The bare machinery of a fleet, for `benchmarks.fleet`: devices that train nothing, 1,000 numbers each.

Every device-round is a check-in, a download, a frame of 1,000 float32 numbers, its upload and its fold, by
the device's and the server's own code.
"""

from __future__ import annotations

import asyncio
import gc
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

from aggregator.coordinator import NO_TASK
from benchmarks.bundles import bundle_of
from edge_client.examples import Example, Shard
from fedtt.algorithms import FedAvg
from fedtt.codec import CodecSpec
from fedtt.messages import device_id
from fedtt.seams import Transport
from fedtt.task import RoundSpec, TaskSpec
from fleet.emulated import SharedBundle
from fleet.engine import Fleet, Settings
from fleet.framed import Framed
from fleet.pool import NoopPool
from fleet.population import Population
from fleet.profiles import Profile
from fleet.server import TOKEN, FleetServer
from fleet.virtual_time import VirtualTime
from storage.blobs import MemoryBlobs
from storage.memory import MemoryStore
from storage.store import Store

__all__ = ["Machinery", "measure", "measure_http"]

NUMBERS = 1000  #: trained
Machinery = Literal["typed", "framed", "sqlite"]
TASK = """
name = "noop"
[rounds]
count = {rounds}
cohort = {devices}
retry_s = 0.05
[method]
name = "fedavg"
[codec]
quantise = "fp32"
"""


def measure(
    *,
    devices: int,
    cohort: int,
    rounds: int,
    machinery: Machinery = "typed",
    visit_every_s: float = 60.0,
    seed: int = 0,
) -> dict[str, Any]:
    """Device-rounds a second of one run, after one round that is not counted.

    A training takes 10 s, and a device comes back 30 to 90 s after its receipt; some find their round still
    open and are told to wait.
    """
    with TemporaryDirectory() as name, _store(machinery, Path(name)) as store:
        bundle, clock = bundle_of(Path(name), NUMBERS), VirtualTime(1_700_000_000.0)
        spec = TaskSpec(
            name="noop",
            rounds=RoundSpec(count=rounds + 1, cohort=cohort, deadline_s=3600, retry_s=30),
            method=FedAvg(),
            codec=CodecSpec(quantise="fp32"),
        )
        server = FleetServer(clock, store, MemoryBlobs(), spec=spec, bundle=Path(name), seed=seed)

        def connect(key: bytes) -> tuple[bytes, Transport]:
            transport = server.transport(device_id(key))
            return key, Framed(transport) if machinery == "framed" else transport

        fleet = Fleet(
            Settings(seed=seed, token=TOKEN, spread_s=visit_every_s, visit_every_s=visit_every_s),
            Population(size=devices, shards=1, profiles=[Profile()], seed=seed),
            [Shard([Example("a text", 0)])],
            SharedBundle(bundle, 1000),
            NoopPool(),
            clock,
            connect,
        )
        fleet.start()
        server.run_clock()
        clock.run(lambda: server.version.number >= 1)
        gc.collect()
        done, started = fleet.participations.outcomes["acknowledged"], time.perf_counter()
        cpu_started = time.process_time()
        clock.run(lambda: server.ended)
        wall_s = time.perf_counter() - started
        count = fleet.participations.outcomes["acknowledged"] - done
        fleet.stop()
        return {
            "devices": devices,
            "cohort": cohort,
            "machinery": machinery,
            "device_rounds": count,
            "wall_s": round(wall_s, 3),
            "cpu_s": round(time.process_time() - cpu_started, 3),
            "device_rounds_per_s": round(count / wall_s, 1),
            "resident_mb": _most_resident_mb(),
        }


async def measure_http(*, devices: int, rounds: int, seed: int = 0) -> dict[str, Any]:
    """The same against a server process, over loopback HTTP with signed requests and SQLite, in real time."""
    from aggregator.admin_client import AdminClient  # their libraries take memory of their own
    from fleet.federation import server_process
    from fleet.real_time import RealTime, http_connect

    task = TASK.format(rounds=rounds, devices=devices)
    clock = RealTime()
    with TemporaryDirectory() as name:
        bundle = bundle_of(Path(name), NUMBERS)
        async with server_process(Path(name) / "server") as server:
            async with AdminClient(server.admin_url, server.admin_token) as admin:
                await admin.create_task(task, await admin.send_bundle(Path(name)))
            fleet = Fleet(
                Settings(seed=seed, token=server.enrolment_token, spread_s=0.1, visit_every_s=0.05),
                Population(
                    size=devices, shards=1, profiles=[Profile(step_s=1e-3, latency_s=1e-4)], seed=seed
                ),
                [Shard([Example("a text", 0)])],
                SharedBundle(bundle, 0),
                NoopPool(),
                clock,
                http_connect(server.url, clock),
            )
            fleet.start()
            started = time.perf_counter()
            while fleet.last_waited_for != NO_TASK and not clock.failed.done():
                await asyncio.sleep(0.05)
            wall_s = time.perf_counter() - started
            fleet.stop()
            await clock.close()
    count = fleet.participations.outcomes["acknowledged"]
    return {
        "devices": devices,
        "machinery": "http",
        "device_rounds": count,
        "wall_s": round(wall_s, 3),
        "device_rounds_per_s": round(count / wall_s, 1),
    }


def _most_resident_mb() -> float:
    """The most this process has had so far."""
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6, 1)


@contextmanager
def _store(machinery: Machinery, directory: Path) -> Iterator[Store]:
    if machinery != "sqlite":
        yield MemoryStore(keep_rounds=1)  # late updates of a synchronous round are refused, known or not
        return
    from storage.sql import SqlStore  # its libraries take memory of their own

    store = SqlStore.open(f"sqlite:///{directory / 'fleet.db'}")
    try:
        yield store
    finally:
        store.close()
