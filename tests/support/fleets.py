"""Small fleets on a small bundle, for tests."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from edge_client.bundle import Bundle
from edge_client.examples import Example, Shard
from edge_client.runtime import Runtimes
from fedtt.codec import CodecSpec
from fedtt.messages import device_id
from fedtt.optimiser import TrainingSpec
from fedtt.seams import Transport
from fedtt.task import RoundSpec, TaskSpec
from fleet.availability import Availability
from fleet.conditions import Daily
from fleet.emulated import SharedBundle
from fleet.engine import Fleet, Settings
from fleet.faults import FaultSpec
from fleet.framed import Framed
from fleet.participation import Participations, Row
from fleet.pool import NoopPool, Pool
from fleet.population import Population
from fleet.profiles import Profile
from fleet.server import TOKEN, FleetServer
from fleet.spec import DailySpec
from fleet.virtual_time import VirtualTime
from storage.blobs import MemoryBlobs
from storage.memory import MemoryStore
from storage.records import Version
from tests.support.edge import small_bundle

__all__ = ["SmallFleet", "small_task"]


def small_task(*, rounds: int = 3, cohort: int = 10, **changes: object) -> TaskSpec:
    settings: dict[str, object] = {"count": rounds, "cohort": cohort, "deadline_s": 600.0, "retry_s": 20.0}
    return TaskSpec(
        name="lights",
        seed=5,
        rounds=RoundSpec(**(settings | changes)),  # type: ignore[arg-type]  # read as a task file's is
        training=TrainingSpec(local_steps=2, batch_size=4),
        codec=CodecSpec(quantise="int8"),
    )


class SmallFleet:
    """A fleet whose devices hold five examples each, its server, and what came of it."""

    def __init__(
        self,
        directory: Path,
        *,
        devices: int = 10,
        task: TaskSpec | None = None,
        profiles: Sequence[Profile] = (Profile(),),
        pool: Pool | None = None,
        availability: Availability | None = None,
        conditions: DailySpec | None = None,
        spread_s: float = 20.0,
        faults: FaultSpec | None = None,
        visit_every_s: float | None = None,
        needs_memory_mb: int = 0,
        store: MemoryStore | None = None,
        framed: bool = False,
        judges: Runtimes | None = None,
        seed: int = 1,
    ) -> None:
        self.time = VirtualTime(1_000_000.0)
        self.bundle: Bundle = small_bundle(directory)
        self.versions: list[Version] = []
        self.rows: list[Row] = []
        self.server = FleetServer(
            self.time,
            store or MemoryStore(),
            MemoryBlobs(),
            spec=task or small_task(),
            bundle=directory,
            seed=seed,
            on_version=self.versions.append,
        )
        self.population = Population(size=devices, shards=1, profiles=profiles, seed=seed)
        on_battery = [profiles[kind].power == "battery" for kind in self.population.profile]
        self.daily = Daily(conditions, seed=seed, on_battery=on_battery) if conditions else None
        self.fleet = Fleet(
            Settings(
                seed=seed,
                token=TOKEN,
                spread_s=spread_s,
                visit_every_s=visit_every_s,
                needs_memory_mb=needs_memory_mb,
            ),
            self.population,
            [Shard([Example(f"lights {n}", n % 2) for n in range(5)])],
            SharedBundle(self.bundle, download_bytes=1000),
            pool or NoopPool(),
            self.time,
            lambda key: (key, self._connect(device_id(key), framed=framed)),
            availability=availability,
            conditions=self.daily,
            faults=faults,
            judges=judges,
            participations=Participations(self.time.now(), self.rows.append),
        )

    def _connect(self, device: str, *, framed: bool) -> Transport:
        plain = self.server.transport(device)
        return Framed(plain) if framed else plain

    def run(self, lasts_s: float = 86400.0) -> str:
        """Let the fleet live until its task has ended; returns the name of the last version."""
        self.fleet.start()
        self.server.run_clock()
        self.time.run(lambda: self.server.ended, self.time.now() + lasts_s)
        self.fleet.close()
        self.time.run(lambda: not self.fleet.awake, self.time.now() + 3600)
        return self.server.version.sha256
