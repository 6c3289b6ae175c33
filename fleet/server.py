"""The real server without sockets or threads, under a fleet's own clock."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from aggregator.admin import open_task
from aggregator.coordinator import Coordinator
from aggregator.promised import promised
from aggregator.rules import seat_open_to_all
from aggregator.service import Service
from aggregator.token_files import token_sha256
from fedtt.errors import FedttError
from fedtt.manifest import MANIFEST, bundle_digest, decode_manifest
from fedtt.messages import Problem
from fedtt.rng import Purpose, rng_for
from fedtt.task import TaskSpec
from fleet.in_process import InProcess, Shelf
from fleet.virtual_time import VirtualTime, at_once
from storage.blobs import BlobStore, save
from storage.records import MAIN, Bundle, RoundState, Task, TaskState, Token, Version, rank_branch
from storage.store import Store

__all__ = ["TOKEN", "FleetServer"]

TOKEN = "emulated"  # noqa: S105  #: of enrolment, with a server that no one else reaches
_KEPT = 64  #: versions whose factors stay, at least
_TICK_S = 0.5  #: between looks at deadlines, as `aggregator.service` has it; more where they are far apart
_TICKS = 500  #: in the time a round has


class FleetServer:
    """One task on one aggregator; names of leases follow from the seed.

    The aggregator does what is due once enough updates may be in, and looks at its deadlines twice a second,
    or where rounds have much time at each 500th part of that: ticks of many quiet hours would cost more than
    the devices.
    `task` is the task as it was when that was done last; `on_version` is told of every version that makes.
    Factors of versions long past are let go of.
    """

    def __init__(
        self,
        time: VirtualTime,
        store: Store,
        blobs: BlobStore,
        *,
        spec: TaskSpec,
        bundle: Path,
        seed: int,
        on_version: Callable[[Version], None] = lambda version: None,
    ) -> None:
        """Open the task; raises FedttError where the bundle cannot serve it."""
        self.service = Service(store, blobs, time, inline=True)
        self.service.coordinator = Coordinator(self.service.lifecycle, _lease_ids(seed).__next__)
        self.service.new_draw_key = rng_for(seed, Purpose.SAMPLING).bytes(16).hex
        self._time, self._shelf = time, Shelf()
        self._settling, self._on_version = False, on_version
        self._arrived, self._enough = 0, spec.rounds.closes_at  #: updates since the last version
        self._kept = max(_KEPT, spec.rounds.max_staleness + 2)
        self._tick_s = max(_TICK_S, spec.rounds.deadline_s / _TICKS)
        self.task = self._open(spec, bundle)
        self.version = self._latest()

    def _open(self, spec: TaskSpec, directory: Path) -> Task:
        data = (directory / MANIFEST).read_bytes()
        manifest, digest = decode_manifest(data), bundle_digest(data)
        save(self.service.blobs, (directory / manifest.initial).read_bytes())
        with self.service.store.transaction() as tx:
            tx.put_bundle(Bundle(sha256=digest, manifest=data, added_at=self._time.now()))
            tx.put_token(Token(sha256=token_sha256(TOKEN), uses_left=None, expires_at=None))
        opened = at_once(open_task(self.service, spec, digest))
        if isinstance(opened, Problem):
            raise FedttError(f"task {spec.name} cannot be opened: {opened.detail}")
        with self.service.store.reading() as tx:
            return promised(tx.task(spec.name), "the task that was opened")

    def transport(self, device: str) -> InProcess:
        return InProcess(self.service, device, settle=self._settle_soon, shelf=self._shelf)

    def run_clock(self) -> None:
        """Look at deadlines from now on."""
        self._tick()
        self._time.call_at(self._time.now() + self._tick_s, self.run_clock)

    def _settle_soon(self) -> None:
        """Once for all updates that come at the same time, when they may be enough to close a round."""
        self._arrived += 1
        if not self._settling and self._arrived >= self._enough:
            self._settling = True
            self._time.call_at(self._time.now(), self._tick)

    def _tick(self) -> None:
        self._settling = False
        at_once(self.service.tick())
        with self.service.store.reading() as tx:
            self.task = promised(tx.task_by_id(self.task.id), "the fleet's task")
        version = self._latest()
        if version.number != self.version.number:
            self.version, self._arrived = version, 0
            self._forget(version.number - self._kept)
            self._on_version(version)

    def _forget(self, number: int) -> None:
        """Let go of the factors of a version that no device and no fold will ask for, but for the first."""
        if number < 1:
            return
        names, recent = self._blobs_of(number), self._blobs_of(number + 1)
        for sha256 in names - recent - self._blobs_of(self.version.number):
            self.service.blobs.delete(sha256)

    def _blobs_of(self, number: int) -> set[str]:
        branches = [MAIN, *map(rank_branch, self.task.spec.method.ranks)]
        with self.service.store.reading() as tx:
            versions = [tx.version(self.task.id, branch, number) for branch in branches]
        found = [version for version in versions if version is not None]
        return {v.sha256 for v in found} | {v.server_state for v in found if v.server_state}

    @property
    def ended(self) -> bool:
        return self.task.state is not TaskState.ACTIVE

    @property
    def awaited(self) -> int | None:
        """The number of the round that any device may begin and none has, 0 before the first.

        None while there is none, and where groups wait for one another.
        """
        with self.service.store.reading() as tx:
            round_ = tx.latest_round(self.task.id, MAIN)
        if round_ is None:
            return 0
        begun = round_.state is not RoundState.OPEN or round_.deadline_at is not None
        if self.task.groups or begun or not seat_open_to_all(self.task.spec.rounds, round_, self._time.now()):
            return None
        return round_.number

    def _latest(self) -> Version:
        with self.service.store.reading() as tx:
            return promised(tx.latest_version(self.task.id, MAIN), "a version of the fleet's task")


def _lease_ids(seed: int) -> Iterator[str]:
    draw = rng_for(seed, Purpose.LEASES).bytes
    while True:
        many = draw(16 * 256)
        yield from (many[start : start + 16].hex() for start in range(0, len(many), 16))
