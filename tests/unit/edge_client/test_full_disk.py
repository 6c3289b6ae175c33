"""A disk without room: the device says so, goes on once there is room again, and has lost nothing.

The kernel refuses to let a file grow past RLIMIT_FSIZE as it does on a full disk; Python ignores its signal.
"""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from edge_client import events
from edge_client.examples import Example, ExampleStore
from edge_client.files import write_atomically
from edge_client.journal import Idle, Journal, Leased, Trained
from edge_client.tokens import Batch
from fedtt.errors import DiskFullError
from fedtt.layout import Theta
from tests.support.device_world import World, in_world
from tests.support.edge import MeanTarget, locked_home


def room(size_bytes: int | None) -> None:
    """Let no file of this process grow past a size; None for any."""
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard if size_bytes is None else size_bytes, hard))


@pytest.fixture(autouse=True)
def _room_again() -> Iterator[None]:
    yield
    room(None)


@contextmanager
def full(size_bytes: int = 0) -> Iterator[None]:
    room(size_bytes)
    try:
        yield
    finally:
        room(None)


def failed(step: events.Step) -> bool:
    return isinstance(step, events.Retrying)


def acknowledged(step: events.Step) -> bool:
    return isinstance(step, events.Acknowledged)


def leftovers(world: World) -> list[Path]:
    return list(world.home.directory.rglob("*.new"))


def test_a_file_for_which_there_is_no_room_is_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "state"
    write_atomically(path, b"old")
    with full(1000), pytest.raises(DiskFullError, match=f"{path} cannot be used"):
        write_atomically(path, bytes(1001))
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["state"]


def test_a_download_without_room_waits_for_it_and_goes_on_under_the_same_lease(tmp_path: Path) -> None:
    async def test(world: World) -> None:
        device, transport = world.device()
        with full(150_000):  # of a base of 250,000 bytes
            step = await device.run(failed)
        assert isinstance(step, events.Retrying)
        assert "base.bin.part cannot be used (File too large)" in step.error
        assert step.pause_s > 0
        phase = device.journal.state.phase
        assert isinstance(phase, Leased)
        assert phase.attempts == 0
        (part,) = world.home.bundles.rglob("base.bin.part")
        assert 0 < part.stat().st_size <= 150_000  # what had come is kept
        await device.run(acknowledged)
        assert [lease for lease, _ in transport.frames] == [phase.work.lease]

    in_world(tmp_path, test)


def test_a_frame_that_cannot_be_stored_is_not_sent_and_trained_again(tmp_path: Path) -> None:
    async def test(world: World) -> None:
        class FillsUp(MeanTarget):
            def gradient(self, theta: Theta, batch: Batch) -> tuple[float, Theta]:
                room(64)
                return super().gradient(theta, batch)

        world.runtime = FillsUp()
        device, transport = world.device()
        step = await device.run(failed)
        room(None)
        assert isinstance(step, events.Retrying)
        assert "File too large" in step.error
        assert isinstance(device.journal.state.phase, Leased)
        assert transport.frames == []
        world.runtime = MeanTarget()
        device, transport = world.device()  # as after a restart: the journal can be read
        await device.run(acknowledged)
        assert world.version()[0] == 1
        assert leftovers(world) == []

    in_world(tmp_path, test)


@pytest.mark.parametrize("call", ["enroll", "check_in", "upload"])
def test_an_answer_that_cannot_be_noted_is_asked_for_again(call: str, tmp_path: Path) -> None:
    async def test(world: World) -> None:
        full_once = iter([True])

        def fills_up(name: str) -> None:
            if name == call and next(full_once, False):
                room(64)

        device, transport = world.device(after=fills_up)
        before = await device.run(failed)
        assert isinstance(before, events.Retrying)
        assert "File too large" in before.error
        room(None)
        await device.run(acknowledged)
        assert isinstance(device.journal.state.phase, Idle)
        assert device.journal.state.acknowledged == 1
        assert len({lease for lease, _ in transport.frames}) == 1
        assert len({frame for _, frame in transport.frames}) == 1  # the same bytes, however often
        assert world.version()[0] == 1
        assert leftovers(world) == []

    in_world(tmp_path, test)


def test_a_frame_in_hand_outlives_a_full_disk_and_a_restart(tmp_path: Path) -> None:
    async def test(world: World) -> None:
        device, _ = world.device()
        await device.run(lambda step: isinstance(step, events.Trained))
        phase = device.journal.state.phase
        assert isinstance(phase, Trained)
        with full(64):
            for _ in range(3):
                assert isinstance(await device.step(), events.Retrying)
        device, transport = world.device()
        await device.run(acknowledged)
        assert transport.frames == [(phase.lease, phase.frame)]
        assert world.version()[0] == 1

    in_world(tmp_path, test)


def test_what_the_journal_holds_already_needs_no_room(tmp_path: Path) -> None:
    with locked_home(tmp_path / "home") as home:
        Journal(home).update(ca="/ca.pem", release_key=bytes(32))
        with full(0):
            journal = Journal(home)  # as a client does at each start
            journal.update(ca="/ca.pem", release_key=bytes(32))
            with pytest.raises(DiskFullError):
                journal.update(ca="/other.pem")


def test_a_store_of_examples_without_room_is_a_full_disk_that_passes(tmp_path: Path) -> None:
    with closing(ExampleStore(tmp_path / "examples.db")) as store:
        store.add("lights on", 1)
        store._db.execute("PRAGMA max_page_count = 1")
        with pytest.raises(DiskFullError, match=r"examples\.db cannot be used \(database or disk is full\)"):
            store.replace_file("rows", [Example(f"lights {number}" * 9) for number in range(999)])
        store._db.execute("PRAGMA max_page_count = 1000000")
        assert store.count() == 1


def test_a_device_waits_for_room_where_its_examples_cannot_be_counted(tmp_path: Path) -> None:
    class Full(ExampleStore):
        def count(self) -> int:
            raise DiskFullError("examples.db cannot be used (database or disk is full)")

    async def test(world: World) -> None:
        store, world.examples = world.examples, Full(None)
        step = await world.device()[0].run(failed)
        assert "disk is full" in getattr(step, "error", "")
        world.examples = store
        await world.device()[0].run(acknowledged)

    in_world(tmp_path, test)
