"""A fleet of unmodified devices: who wakes up when, and what is remembered of those that sleep.

A device is made when it arrives, runs its own client until that has to wait with nothing in hand, and is
taken apart again; what its journal says is kept. A crash and the end of its window of availability do to it
what they do in the field: the one drops it where it is, the other cancels what it does.
"""

from __future__ import annotations

import logging
from asyncio import CancelledError
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from aggregator.inline import Aside, at_once
from edge_client import events
from edge_client.device import Device
from edge_client.device_config import DeviceConfig
from edge_client.examples import Examples
from edge_client.journal import Idle, Journal, Leased
from edge_client.runtime import Runtimes
from fedtt.errors import FedttError
from fedtt.messages import FailureCode
from fedtt.rng import Purpose, rng_for, uniform_at
from fedtt.seams import Transport
from fleet.availability import Always, Availability
from fleet.conditions import Daily, OfDevice
from fleet.emulated import EmulatedTrainer, SharedBundle, SharedVersions, Vanished
from fleet.faults import FaultSpec, Faulty
from fleet.link import DeviceClock, Link
from fleet.participation import Participation, Participations
from fleet.pool import Pool
from fleet.population import Population, StatePlace, device_key
from fleet.profiles import Profile
from fleet.timeline import Running, Timeline

__all__ = ["Fleet", "Settings"]

_log = logging.getLogger("fedtt.fleet")
_REBOOT_S = 60.0  #: after which a device that vanished is there again
_AWAITED = 4096  #: arrivals that wait in the clock's own queue; the others wait in an array
_GOES_ON = {events.Retrying, events.Dropped, events.Judged}  #: with what it remembers of this visit
_FAILURES = 3  #: with no training between them, after which a device counts as one that cannot train


class Settings(Struct, frozen=True, kw_only=True):
    """What holds for all devices of a fleet."""

    seed: int
    token: str
    spread_s: float  #: in which all devices come for the first time
    visit_every_s: float | None = None  #: mean between two visits; None comes whenever the server said
    needs_memory_mb: int = 0  #: what training takes
    client: str = "fedtt-fleet"


class Fleet:
    """All devices, over one timeline.

    shards: the data, by number of shard. connect: gives a device, by its 32 secret bytes, its public key and
    its way to the server. aside: how the pool's blocking answer is waited for.
    """

    def __init__(
        self,
        settings: Settings,
        population: Population,
        shards: Sequence[Examples],
        bundle: SharedBundle,
        pool: Pool,
        time: Timeline,
        connect: Callable[[bytes], tuple[bytes, Transport]],
        *,
        availability: Availability | None = None,
        conditions: Daily | None = None,
        faults: FaultSpec | None = None,
        participations: Participations | None = None,
        judges: Runtimes | None = None,
        aside: Aside = at_once,
    ) -> None:
        self.settings, self.population, self.time = settings, population, time
        self.participations = participations or Participations()
        self.left_out: Counter[str] = Counter()  #: devices that cannot take part, by reason
        self._shards, self._bundle, self._pool, self._connect = shards, bundle, pool, connect
        self._availability, self._faults = availability or Always(), faults
        self._conditions = conditions
        self._versions, self._aside, self._judges = SharedVersions(), aside, judges
        self._configs = [self._config(profile) for profile in population.profiles]
        self._awake: dict[int, tuple[Running, Journal]] = {}
        self._ends: dict[float, dict[int, Running]] = {}  #: whom the end of a window stops, as they came
        self._closed = False  #: to whoever arrives
        self._gone = 0  #: devices that come no more
        self.last_waited_for = ""  #: why the server last had a device wait
        self.newest: events.Granted | None = None  #: the first lease of the newest version
        self.last_rested_for = ""  #: why a device last asked for nothing
        self._waits = np.full(population.size, -1, np.int32)  #: in which `_asking` it was told to wait
        self._asking, self._waiting = 0, 0  #: the latter counts those of now
        self._horizon = -np.inf  #: arrivals up to here wait in the clock's own queue

    def _config(self, profile: Profile) -> DeviceConfig:
        config = DeviceConfig(
            token=self.settings.token,
            client=self.settings.client,
            memory_mb=profile.memory_mb,
            label_epsilon=profile.label_epsilon,
            judges=self._judges is not None,
            limits=profile.limits,
            seed=self.settings.seed,
        )
        return config if self._conditions is None else self._conditions.looked_at(config)

    @property
    def is_over(self) -> bool:
        """Whether no device will come again."""
        return self._gone >= self.population.size

    @property
    def all_wait(self) -> bool:
        """Whether all that still come were told to wait since the last lease, or since `ask_again`."""
        return self._waiting >= self.population.size - self._gone

    def ask_again(self) -> None:
        """Forget who was told to wait."""
        self._asking, self._waiting = self._asking + 1, 0

    def _told_to_wait(self, index: int) -> None:
        if self._waits[index] != self._asking:
            self._waits[index] = self._asking
            self._waiting += 1

    def _has_gone(self, index: int) -> None:
        self._gone += 1
        self._waiting -= int(self._waits[index] == self._asking)

    @property
    def awake(self) -> int:
        """Devices that exist now."""
        return len(self._awake)

    @property
    def why_time_was_over(self) -> str:
        """Why a run that ends for its time has not come further, as far as devices have heard."""
        heard = {"was last told": self.last_waited_for, "last rested because": self.last_rested_for}
        told = [f"a device {how}: {why}" for how, why in heard.items() if why]
        return "; ".join(["its time (fleet.last_s) was over", *told])

    def start(self) -> None:
        """Let every device come for the first time, spread evenly."""
        rng = rng_for(self.settings.seed, Purpose.ARRIVALS)
        drawn = rng.random(self.population.size) * self.settings.spread_s
        self.population.next_at[:] = self.time.now() + drawn
        self._queue_arrivals()

    def close(self) -> None:
        """Drop whoever trains and let nobody in; those on their way to or from the server may finish."""
        self._closed = True
        for running, journal in list(self._awake.values()):
            if isinstance(journal.state.phase, Leased):
                running.kill()

    def stop(self) -> None:
        """Drop every device that is awake."""
        self._closed = True
        for running, _ in list(self._awake.values()):
            running.kill()

    # arrivals

    def _queue_arrivals(self) -> None:
        """Hand the next arrivals to the clock, in order of time and device."""
        next_at = self.population.next_at
        few = self.population.size <= _AWAITED
        self._horizon = np.inf if few else float(np.partition(next_at, _AWAITED)[_AWAITED])
        due = np.flatnonzero((next_at <= self._horizon) & (next_at < np.inf))
        for index in due[np.argsort(next_at[due], kind="stable")].tolist():
            self._queue(index, float(next_at[index]))
        if self._horizon < np.inf:
            self.time.call_at(self._horizon, self._queue_arrivals)

    def _queue(self, index: int, at: float) -> None:
        self.population.next_at[index] = np.inf
        self.time.call_at(at, partial(self._arrive, index))

    def _come_again(self, index: int, at: float) -> None:
        if at <= self._horizon:
            self._queue(index, at)
        else:
            self.population.next_at[index] = at

    def _arrive(self, index: int) -> None:
        now = self.time.now()
        window = self._availability.window(index, now)
        if window is None or self._closed:
            self._has_gone(index)
            return
        start, end = window
        if now < start:
            self._come_again(index, start)
            return
        journal = Journal(StatePlace(self.population.state(index)))
        running = self.time.start(self._visit(index, journal))
        if running.over:
            return
        self._awake[index] = (running, journal)
        if end < np.inf:
            self._stop_at(end, index, running)

    def _stop_at(self, end: float, index: int, running: Running) -> None:
        """Have a window's end stop a visit; one call waits for it, however many visits there are."""
        if end not in self._ends:
            self._ends[end] = {}
            self.time.call_at(end, partial(self._end_windows, end))
        self._ends[end].pop(index, None)
        self._ends[end][index] = running

    def _end_windows(self, end: float) -> None:
        for running in self._ends.pop(end).values():
            running.stop()

    # visits

    async def _visit(self, index: int, journal: Journal) -> None:
        """A device's client from its start to where it sleeps with nothing in hand, or is ended."""
        population, clock = self.population, DeviceClock(self.time)
        key, link = self._link(index, clock)
        participation = self.participations.of(index, clock)
        device = self._device(index, key, journal, clock, link, participation)
        next_at = self.time.now() + _REBOOT_S
        try:
            await device.consent()
            step = await device.run(partial(self._rests, journal))
            next_at = self._next_at(index, step, clock.now())
        except Vanished:
            participation.crashed()
        except CancelledError:
            next_at = self.time.now()  # its next window, which begins later
        except FedttError as error:  # what a device cannot go on from
            self._leave_out(index, str(error))
        finally:
            self._awake.pop(index, None)
            participation.asleep()
            self._count(index, link)
            if not population.left_out[index]:
                population.keep(index, journal.state)
                self._come_again(index, next_at)
            await link.close()

    def _link(self, index: int, clock: DeviceClock) -> tuple[bytes, Link]:
        """A device's public key, and its way to the server."""
        population, seed = self.population, self.settings.seed
        key, transport = self._connect(device_key(seed, index))
        if self._faults is not None:
            number = partial(_count_up, population.exchanges, index)
            transport = Faulty(transport, clock, self._faults, seed=seed, device=index, next_number=number)
        return key, Link(transport, clock, population.profiles[population.profile[index]])

    def _device(
        self,
        index: int,
        key: bytes,
        journal: Journal,
        clock: DeviceClock,
        link: Link,
        participation: Participation,
    ) -> Device:
        population, settings = self.population, self.settings
        kind = int(population.profile[index])

        def downloaded() -> None:
            population.has_bundle[index] = True

        return Device(
            self._configs[kind],
            public_key=key,
            journal=journal,
            transport=link,
            examples=self._shards[population.shard[index]],
            bundles=self._bundle.of(link, held=bool(population.has_bundle[index]), on_download=downloaded),
            versions=self._versions.of(index),
            trainer=EmulatedTrainer(
                self._pool,
                clock,
                journal,
                index=index,
                profile=population.profiles[kind],
                speed=population.speed_factor(index),
                seed=settings.seed,
                needs_memory_mb=settings.needs_memory_mb,
                judges=self._judges,
                aside=self._aside,
            ),
            clock=clock,
            conditions=self._conditions_of(index, clock),
            hold=self.time.held,
            observe=partial(self._observe, index, participation, link),
            uniform=_label_noise(settings.seed, index).__next__,
            aside=at_once,
        )

    def _conditions_of(self, index: int, clock: DeviceClock) -> OfDevice | None:
        if self._conditions is None:
            return None
        profile = self.population.profiles[self.population.profile[index]]
        return OfDevice(self._conditions, index, profile, clock)

    def _rests(self, journal: Journal, step: events.Step) -> bool:
        """Whether a client could as well be started anew after its pause."""
        comes_anew = self.settings.visit_every_s is not None and type(step) is events.Acknowledged
        if type(step) in _GOES_ON or not (step.pause_s > 0 or comes_anew):
            return False
        return isinstance(journal.state.phase, Idle)

    def _next_at(self, index: int, step: events.Step, now: float) -> float:
        if type(step) is events.Retired:
            self._leave_out(index, f"the server retired it: {step.reason}")
        every_s = self.settings.visit_every_s
        if every_s is None:
            return now + step.pause_s
        drawn = uniform_at(self.settings.seed, Purpose.ARRIVALS, int(1000 * now), index)
        return now + max(step.pause_s, every_s * (0.5 + drawn))

    def _observe(self, index: int, participation: Participation, link: Link, event: events.Event) -> None:
        participation.observe(event)
        if type(event) is events.Trained:
            self.population.failures[index] = 0
        elif type(event) is events.Acknowledged:
            self._count(index, link)
            self.population.participations[index] += 1
        elif type(event) is events.Waiting:
            self.last_waited_for = event.reason
            self._told_to_wait(index)
        elif type(event) is events.Granted:
            self.ask_again()
            if self.newest is None or event.version_number > self.newest.version_number:
                self.newest = event
        elif type(event) is events.Resting:
            self.last_rested_for = event.reason
        elif type(event) is events.GaveUp and event.code is not FailureCode.CONDITIONS:
            self.population.failures[index] += 1
            if self.population.failures[index] >= _FAILURES:
                self._leave_out(index, event.detail)

    def _count(self, index: int, link: Link) -> None:
        """Move what has travelled to the books."""
        if not (link.sent_bytes or link.received_bytes or link.bundle_bytes or link.check_ins):
            return
        population, totals = self.population, self.participations.traffic
        population.sent_bytes[index] += link.sent_bytes
        population.received_bytes[index] += link.received_bytes
        totals.check_ins += link.check_ins
        totals.sent_bytes += link.sent_bytes
        totals.received_bytes += link.received_bytes
        totals.bundle_bytes += link.bundle_bytes
        link.sent_bytes = link.received_bytes = link.bundle_bytes = link.check_ins = 0

    def _leave_out(self, index: int, reason: str) -> None:
        if not self.population.left_out[index]:
            self.population.leave_out(index)
            self.left_out[reason] += 1
            self._has_gone(index)
            _log.warning("device %d cannot take part and is left out: %s", index, reason)


def _label_noise(seed: int, index: int) -> Iterator[float]:
    """The same draws in every run; none is made before it is asked for."""
    rng = rng_for(seed, Purpose.LABEL_NOISE, 0, index)
    while True:
        yield float(rng.random())


def _count_up(counts: NDArray[np.int32], index: int) -> int:
    counts[index] += 1
    return int(counts[index])
