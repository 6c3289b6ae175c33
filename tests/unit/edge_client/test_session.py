"""What the owner of a device may do, over real sockets against the aggregator's routes."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Awaitable, Callable
from contextlib import closing
from pathlib import Path

import pytest

from aggregator.app import device_app
from aggregator.service import Service
from edge_client import events
from edge_client.bundle_cache import LIMIT_BYTES
from edge_client.device_config import DeviceConfig
from edge_client.events import Event, Step
from edge_client.examples import ExampleStore
from edge_client.home import Home
from edge_client.journal import Journal, Leased, read_state
from edge_client.local_trainer import LocalTrainer
from edge_client.runtime import Runtime, Runtimes
from edge_client.session import forget, leave, open_device, supervise
from fedtt.errors import ConfigError, StorageError, Unreachable
from fedtt.seams import SystemClock
from storage.records import DeviceState
from tests.support.device_world import SPEC
from tests.support.edge import MeanTarget, SlowTarget, write_small_bundle
from tests.support.in_process import TOKEN, listening, memory_service


class Owner:
    """Somebody with a device, and the server it belongs to."""

    def __init__(self, home: Home, url: str, service: Service) -> None:
        self.home, self.url, self.service = home, url, service
        self.seen: list[Event] = []

    async def run(
        self,
        until: Callable[[Step], bool] = lambda _: False,
        url: str | None = None,
        *,
        move: bool = False,
        cache_limit_bytes: int = LIMIT_BYTES,
        runtime: Runtime | None = None,
    ) -> Step | None:
        self.home.create()
        store = ExampleStore(self.home.examples)
        store.add("lights on", 1)
        try:
            async with open_device(
                self.home.directory,
                server=url or self.url,
                examples=store,
                config=DeviceConfig(token=TOKEN),
                move=move,
                cache_limit_bytes=cache_limit_bytes,
                trainer=LocalTrainer(Runtimes(lambda bundle: runtime or MeanTarget())),
                observe=self.seen.append,
            ) as device:
                await device.consent()
                return await supervise(device, self.home, until, self.seen.append)
        finally:
            store.close()

    async def until_seen(self, kind: type[Event]) -> None:
        async with asyncio.timeout(10):
            while not any(isinstance(event, kind) for event in self.seen):
                await asyncio.sleep(0.01)

    def device_state(self) -> DeviceState:
        with self.service.store.reading() as tx:
            (device,) = tx.devices()
        return device.state


def owning(tmp_path: Path, test: Callable[[Owner], Awaitable[None]]) -> None:
    async def run() -> None:
        write_small_bundle(tmp_path / "bundle", 1000)
        async with (
            memory_service(tmp_path / "blobs", SPEC, tmp_path / "bundle", SystemClock()) as service,
            listening(device_app(service)) as url,
        ):
            await test(Owner(Home(tmp_path / "home"), url, service))

    asyncio.run(run())


def acknowledged(step: Step) -> bool:
    return isinstance(step, events.Acknowledged)


def test_a_device_takes_part_over_http_and_says_what_it_cost(tmp_path: Path) -> None:
    async def test(owner: Owner) -> None:
        assert acknowledged_step(await owner.run(acknowledged))
        ended = owner.seen[-1]
        assert isinstance(ended, events.Ended)
        (trained,) = [event for event in owner.seen if isinstance(event, events.Trained)]
        assert ended.sent_bytes > trained.frame_bytes
        assert ended.received_bytes > ended.bundle_bytes > 1000
        assert not owner.home.is_running()

    def acknowledged_step(step: Step | None) -> bool:
        return step is not None and acknowledged(step)

    owning(tmp_path, test)


def test_a_paused_device_rests_and_goes_on_where_it_was(tmp_path: Path) -> None:
    async def test(owner: Owner) -> None:
        owner.home.pause(True)
        running = asyncio.create_task(owner.run(acknowledged))
        await owner.until_seen(events.Paused)
        assert not any(isinstance(event, Step) for event in owner.seen)
        owner.home.pause(False)
        async with asyncio.timeout(10):
            await running
        assert isinstance(owner.seen[-2], events.Acknowledged)

    owning(tmp_path, test)


def test_pausing_interrupts_a_device_that_waits(tmp_path: Path) -> None:
    async def test(owner: Owner) -> None:
        running = asyncio.create_task(owner.run())
        await owner.until_seen(events.Waiting)
        owner.home.pause(True)
        await owner.until_seen(events.Paused)
        owner.home.stop(True)
        async with asyncio.timeout(10):
            assert await running is None

    owning(tmp_path, test)


def test_a_client_that_is_told_twice_to_end_keeps_its_place_until_its_work_has_ended(tmp_path: Path) -> None:
    async def test(owner: Owner) -> None:
        slow = SlowTarget()
        running = asyncio.create_task(owner.run(runtime=slow))
        await asyncio.to_thread(slow.begun.wait, 10)
        for _ in range(2):  # as two SIGTERMs do
            running.cancel()
            await asyncio.sleep(0.05)
            assert not running.done()
            assert owner.home.is_running()
        slow.go_on.set()
        with pytest.raises(asyncio.CancelledError):
            await running
        state = read_state(owner.home)
        assert state is not None
        assert isinstance(state.phase, Leased)
        assert state.phase.attempts == 0
        assert not owner.home.is_running()

    owning(tmp_path, test)


def test_leaving_stops_a_running_client_and_withdraws_consent(tmp_path: Path) -> None:
    async def test(owner: Owner) -> None:
        running = asyncio.create_task(owner.run())
        await owner.until_seen(events.Waiting)
        assert await leave(owner.home)
        assert await running is None
        assert owner.device_state() is DeviceState.LEFT
        state = read_state(owner.home)
        assert state is not None
        assert (state.enrolled, state.consented_at) == (False, None)
        assert ExampleStore(owner.home.examples).count() == 1
        assert not await leave(owner.home), "a second time there is nothing to leave"

    owning(tmp_path, test)


def test_a_device_that_left_may_come_back_with_a_token(tmp_path: Path) -> None:
    async def test(owner: Owner) -> None:
        await owner.run(acknowledged)
        await leave(owner.home)
        await owner.run(lambda step: isinstance(step, events.Enrolled))
        assert owner.device_state() is DeviceState.ACTIVE

    owning(tmp_path, test)


def test_leaving_is_not_half_done_where_the_server_cannot_be_told(tmp_path: Path) -> None:
    async def test(owner: Owner) -> None:
        await owner.run(acknowledged)
        await unreachable(owner.home)
        with pytest.raises(Unreachable):
            await leave(owner.home)
        state = read_state(owner.home)
        assert state is not None
        assert state.enrolled

    owning(tmp_path, test)


async def unreachable(home: Home) -> None:
    """Let the device believe that its server lives where nobody does."""
    with home.lock():
        Journal(home).update(server="http://127.0.0.1:9")


def test_forgetting_deletes_here_and_erases_there_also_while_running(tmp_path: Path) -> None:
    async def test(owner: Owner) -> None:
        running = asyncio.create_task(owner.run())
        await owner.until_seen(events.Waiting)
        await forget(owner.home, local_only=False)
        assert await running is None
        assert not owner.home.exists
        assert owner.device_state() is DeviceState.ERASED

    owning(tmp_path, test)


def test_forgetting_without_the_server_keeps_just_what_is_needed_to_ask_again(tmp_path: Path) -> None:
    async def test(owner: Owner) -> None:
        await owner.run(acknowledged)
        await unreachable(owner.home)
        with pytest.raises(Unreachable, match=r"everything here but the key is deleted.*--local-only"):
            await forget(owner.home, local_only=False)
        assert {path.name for path in owner.home.directory.iterdir()} == {"identity.key", "state", "lock"}
        state = read_state(owner.home)
        assert state is not None
        assert (state.residuals, state.consented_at) == ({}, None)
        await forget(owner.home, local_only=True)
        assert not owner.home.exists

    owning(tmp_path, test)


@pytest.mark.parametrize("broken", ["address", "certificates"])
def test_a_server_that_cannot_be_addressed_is_as_one_that_cannot_be_reached(
    broken: str, tmp_path: Path
) -> None:
    async def test(owner: Owner) -> None:
        await owner.run(acknowledged)
        with owner.home.lock():
            if broken == "address":
                Journal(owner.home).update(server="http://a server")
            else:
                Journal(owner.home).update(server="https://localhost:9", ca=str(tmp_path / "moved.pem"))
        with pytest.raises(Unreachable, match="the server cannot be told: "):
            await leave(owner.home)
        state = read_state(owner.home)
        assert state is not None
        assert state.enrolled
        with pytest.raises(Unreachable, match=r"everything here but the key is deleted.*--local-only"):
            await forget(owner.home, local_only=False)
        await forget(owner.home, local_only=True)
        assert not owner.home.exists

    owning(tmp_path, test)


def test_forgetting_a_device_the_server_no_longer_knows_is_no_error(tmp_path: Path) -> None:
    async def test(owner: Owner) -> None:
        await owner.run(acknowledged)
        state = read_state(owner.home)
        assert state is not None
        await owner.service.leave(state.device, erase=True)
        await forget(owner.home, local_only=False)
        assert not owner.home.exists

    owning(tmp_path, test)


def test_a_damaged_journal_can_still_be_forgotten_locally(tmp_path: Path) -> None:
    async def test(owner: Owner) -> None:
        await owner.run(acknowledged)
        owner.home.state.write_bytes(b"damaged")
        with pytest.raises(StorageError, match="--local-only"):
            await forget(owner.home, local_only=False)
        await forget(owner.home, local_only=True)
        assert not owner.home.exists

    owning(tmp_path, test)


def test_a_directory_that_never_was_a_devices_is_not_forgotten(tmp_path: Path) -> None:
    home = Home(tmp_path / "documents")
    for directory in (home.bundles, home.versions, home.activations, home.conditions):
        directory.mkdir(parents=True)
        (directory / "letter").write_text("")
    home.state.write_text("California")
    with closing(sqlite3.connect(home.examples)) as database:
        database.execute("CREATE TABLE example (sentence TEXT)")
    before = sorted(home.directory.rglob("*"))
    with pytest.raises(
        StorageError, match=r"documents is no device's directory.*nothing was deleted.*--home"
    ):
        asyncio.run(forget(home, local_only=True))
    assert sorted(home.directory.rglob("*")) == before


@pytest.mark.parametrize("kept", ["a damaged journal", "examples", "damaged examples"])
def test_what_a_device_left_is_forgotten_without_its_key(kept: str, tmp_path: Path) -> None:
    home = Home(tmp_path / "home")
    home.create()
    if "examples" in kept:
        with closing(ExampleStore(home.examples)) as store:
            store.add("lights on", 1)
        if kept == "damaged examples":
            data = home.examples.read_bytes()
            home.examples.write_bytes(data[:100] + bytes(1000) + data[1100:])
    else:
        Journal(home)
        home.state.write_bytes(home.state.read_bytes()[:-1])
    asyncio.run(forget(home, local_only=True))
    assert not home.exists


def test_what_is_forgotten_may_be_forgotten_again(tmp_path: Path) -> None:
    asyncio.run(forget(Home(tmp_path / "home"), local_only=True))
    assert list(tmp_path.iterdir()) == []


def test_a_device_belongs_to_one_server(tmp_path: Path) -> None:
    async def test(owner: Owner) -> None:
        await owner.run(acknowledged)
        with pytest.raises(ConfigError, match=r"this device belongs to .*move=True once its owner agrees"):
            await owner.run(url="http://127.0.0.1:9")
        state = read_state(owner.home)
        assert state is not None
        assert (state.server, state.enrolled) == (owner.url, True)

    owning(tmp_path, test)


def test_a_device_follows_its_server_to_a_new_address_with_the_work_in_hand(tmp_path: Path) -> None:
    async def test(owner: Owner) -> None:
        granted = await owner.run(lambda step: isinstance(step, events.Granted))
        assert isinstance(granted, events.Granted)
        key = owner.home.key.read_bytes()
        async with listening(device_app(owner.service)) as moved:
            assert moved != owner.url
            step = await owner.run(acknowledged, moved, move=True)
        assert isinstance(step, events.Acknowledged)
        assert step.receipt.lease == granted.lease
        state = read_state(owner.home)
        assert state is not None
        assert (state.server, state.enrolled) == (moved, True)
        assert owner.home.key.read_bytes() == key
        assert owner.device_state() is DeviceState.ACTIVE, "one device under one key"

    owning(tmp_path, test)


def test_a_device_that_left_may_go_to_another_server(tmp_path: Path) -> None:
    async def test(owner: Owner) -> None:
        await owner.run(acknowledged)
        await leave(owner.home)
        async with listening(device_app(owner.service)) as another:
            await owner.run(lambda step: isinstance(step, events.Enrolled), another)
        assert owner.device_state() is DeviceState.ACTIVE

    owning(tmp_path, test)


def test_another_server_needs_consent_of_its_own(tmp_path: Path) -> None:
    async def test(owner: Owner) -> None:
        await owner.run(acknowledged)
        async with open_device(
            owner.home.directory,
            server="http://127.0.0.1:9",
            examples=ExampleStore(None),
            config=DeviceConfig(token=TOKEN),
            move=True,
        ) as device:
            with pytest.raises(ConfigError, match="the owner of this device must agree"):
                await device.step()

    owning(tmp_path, test)


def test_an_owner_bounds_the_bundles_that_are_kept(tmp_path: Path) -> None:
    async def test(owner: Owner) -> None:
        step = await owner.run(lambda step: isinstance(step, events.GaveUp), cache_limit_bytes=1000)
        assert isinstance(step, events.GaveUp)
        assert "raise its limit with --cache-limit-mb" in step.detail

    owning(tmp_path, test)


def test_two_clients_on_one_home_are_refused(tmp_path: Path) -> None:
    async def test(owner: Owner) -> None:
        running = asyncio.create_task(owner.run())
        await owner.until_seen(events.Waiting)
        with pytest.raises(StorageError, match="another client is running"):
            await owner.run()
        owner.home.stop(True)
        await running

    owning(tmp_path, test)
