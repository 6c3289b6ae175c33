"""What an emulated device has in place of a disk, a bundle of its own and a processor."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

from msgspec.structs import replace

from aggregator.inline import Aside, at_once
from edge_client.allowance import check_download
from edge_client.bundle import Bundle, RuntimeName
from edge_client.journal import Journal, Leased
from edge_client.judging import JudgingRequest, judge
from edge_client.runtime import Runtimes
from edge_client.trainer import LocalUpdate, TrainingRequest, trained_adapter
from edge_client.version_cache import Held, unpacked
from fedtt.errors import BundleError, Declined, RuntimeFailure
from fedtt.messages import Plan, Verdict
from fedtt.rng import Purpose, rng_for
from fedtt.seams import Clock, Transport, VersionBody
from fedtt.work import work_share
from fleet.link import Link
from fleet.pool import Pool
from fleet.profiles import Profile, judging_s, training_s

__all__ = ["EmulatedTrainer", "SharedBundle", "SharedVersions", "Vanished"]


class Vanished(BaseException):
    """The device is gone in the middle of its work, as in a power cut; nothing of its code may catch this."""


class SharedBundle:
    """One opened bundle for all devices; each spends the time of its own download once."""

    def __init__(self, bundle: Bundle, download_bytes: int) -> None:
        self._bundle, self._download_bytes = bundle, download_bytes

    def of(self, link: Link, *, held: bool, on_download: Callable[[], None]) -> _DeviceBundle:
        """What one device has of it."""
        return _DeviceBundle(self._bundle, 0 if held else self._download_bytes, link, on_download)


class _DeviceBundle:
    def __init__(
        self, bundle: Bundle, missing_bytes: int, link: Link, on_download: Callable[[], None]
    ) -> None:
        self._bundle, self._missing_bytes = bundle, missing_bytes
        self._link, self._on_download = link, on_download

    async def ensure(
        self,
        transport: Transport,
        digest: str,
        release_key: bytes | None = None,
        limit_bytes: int | None = None,
    ) -> Bundle:
        if digest != self._bundle.digest:
            raise BundleError(f"this fleet was given another bundle than {digest[:12]}…, which a task uses")
        check_download(limit_bytes, self._bundle.manifest, self._missing_bytes)
        if self._missing_bytes:
            self._link.download_bundle(self._missing_bytes)
            self._missing_bytes = 0
            self._on_download()
        return self._bundle

    def using(self, digest: str) -> AbstractContextManager[None]:
        """It stays in any case."""
        return nullcontext()


class SharedVersions:
    """The versions that devices hold, each kept once: one for a device, the oldest forgotten by all.

    limit: versions kept, of all devices together.
    """

    def __init__(self, limit: int = 64) -> None:
        self._limit = limit
        self._kept: dict[tuple[str, str], Held] = {}  #: what it is of, and its sha256
        self._held: dict[int, tuple[str, str]] = {}  #: device -> the same
        self._unpacked: dict[tuple[VersionBody, Held | None, str], bytes | None] = {}

    def of(self, index: int) -> _DeviceVersions:
        return _DeviceVersions(self, index)

    def get(self, index: int, key: str, size_bytes: int) -> Held | None:
        name = self._held.get(index)
        found = self._kept.get(name) if name and name[0] == key else None
        return found if found is not None and len(found.data) == size_bytes else None

    def put(self, index: int, key: str, version: Held) -> None:
        name = (key, version.sha256)
        if name not in self._kept:
            self._kept[name] = version
            if len(self._kept) > self._limit:
                del self._kept[next(iter(self._kept))]
        self._held[index] = name

    def unpack(self, body: VersionBody, held: Held | None, sha256: str) -> bytes | None:
        """The same bytes come to the same version, on whichever device."""
        work = (body, held, sha256)
        if work not in self._unpacked:
            while len(self._unpacked) >= self._limit:
                del self._unpacked[next(iter(self._unpacked))]
            self._unpacked[work] = unpacked(body, held, sha256)
        return self._unpacked[work]


class _DeviceVersions:
    """What `edge_client.version_cache` keeps, of one device."""

    def __init__(self, shared: SharedVersions, index: int) -> None:
        self._shared, self._index = shared, index
        self.unpack = shared.unpack

    def get(self, key: str, size_bytes: int) -> Held | None:
        return self._shared.get(self._index, key, size_bytes)

    def put(self, key: str, version: Held) -> None:
        self._shared.put(self._index, key, version)


class EmulatedTrainer:
    """A Trainer that hands its work to a pool and takes as long as the device would.

    speed: by which the device is slower than its profile. seed: of whether and when it vanishes.
    needs_memory_mb: what training takes; a device that says it has less fails, as its runtime would.
    judges: what versions are judged with; None where nobody may be asked.
    """

    def __init__(
        self,
        pool: Pool,
        clock: Clock,
        journal: Journal,
        *,
        index: int,
        profile: Profile,
        speed: float = 1.0,
        seed: int = 0,
        needs_memory_mb: int = 0,
        judges: Runtimes | None = None,
        aside: Aside = at_once,
    ) -> None:
        self._judges = judges
        self._pool, self._clock, self._journal = pool, clock, journal
        self._index, self._profile, self._speed, self._seed = index, profile, speed, seed
        self._needs_memory_mb, self._aside = needs_memory_mb, aside

    @property
    def runtime(self) -> RuntimeName:
        return self._pool.runtime

    async def train(self, request: TrainingRequest) -> LocalUpdate:
        """Raises what `Trainer.train` does, and Vanished."""
        plan, profile = request.plan, self._profile
        if profile.memory_mb and profile.memory_mb < self._needs_memory_mb:
            raise RuntimeFailure(
                f"training needs {self._needs_memory_mb} MB, {profile.name!r} has {profile.memory_mb}"
            )
        share = work_share(trained_adapter(plan, request.bundle.manifest), plan.live)
        lasts_s = self._speed * training_s(profile, plan, share)
        if (limit_s := request.time_limit_s) is not None and lasts_s > limit_s:
            await self._clock.sleep(limit_s)
            raise Declined(f"training has taken the {limit_s:g} s that it may", "time")
        if profile.dropout:
            await self._perhaps_vanish(plan, lasts_s)
        handle = self._pool.submit(request)
        try:
            await self._clock.sleep(lasts_s)
            return replace(await self._aside(handle.result), training_s=lasts_s)
        finally:
            handle.cancel()

    async def judge(self, request: JudgingRequest) -> Verdict:
        """Raises what `Trainer.judge` does."""
        if self._judges is None:
            raise RuntimeFailure("this fleet has nothing to judge versions with")
        rows = min(request.question.examples, request.examples.count())
        lasts_s = self._speed * judging_s(self._profile, rows)
        if (limit_s := request.time_limit_s) is not None and lasts_s > limit_s:
            await self._clock.sleep(limit_s)
            raise Declined(f"judging has taken the {limit_s:g} s that it may", "time")
        await self._clock.sleep(lasts_s)
        runtime = self._judges.open(request.bundle)
        return await self._aside(judge, request, runtime)

    async def _perhaps_vanish(self, plan: Plan, lasts_s: float) -> None:
        phase = self._journal.state.phase
        attempt = phase.attempts if isinstance(phase, Leased) else 0
        rng = rng_for(self._seed, Purpose.DROPOUT, plan.round << 8 | attempt, self._index)
        if rng.random() < self._profile.dropout:
            await self._clock.sleep(lasts_s * rng.random())
            raise Vanished
