from __future__ import annotations

import asyncio
import fcntl
import os
import shutil
import threading
from collections.abc import AsyncGenerator, Iterator
from pathlib import Path

import pytest

from edge_client import bundle_cache, events
from edge_client.bundle import open_bundle
from edge_client.bundle_cache import BundleCache
from edge_client.events import Event
from edge_client.files import try_lock
from fedtt.errors import BundleError, ConfigError, Declined, Unreachable
from fedtt.manifest import MANIFEST, bundle_digest
from fedtt.seams import Transport
from tests.support.clock import VirtualClock
from tests.support.edge import write_small_bundle

BASE_BYTES = 300_000


class Directory:
    """The bundle half of a Transport: serves a directory, and may break off or damage what it sends."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.asked: list[tuple[str, int]] = []
        self.breaks_after: int | None = None  #: bytes of base.bin
        self.damages: set[str] = set()
        self.endless = False

    async def bundle_file(self, bundle: str, name: str, offset: int) -> AsyncGenerator[bytes, None]:
        self.asked.append((name, offset))
        data = (self.directory / name).read_bytes()
        if name in self.damages:
            data = bytes([data[0] ^ 1]) + data[1:]
        sent = 0
        for start in range(offset, len(data), 50_000):
            if name == "base.bin" and self.breaks_after is not None and sent >= self.breaks_after:
                raise Unreachable("the connection broke off")
            sent += len(data[start : start + 50_000])
            yield data[start : start + 50_000]
        while self.endless:
            yield bytes(50_000)


class Place:
    def __init__(self, tmp_path: Path, limit_bytes: int = 1 << 30) -> None:
        self.digest = write_small_bundle(tmp_path / "served", BASE_BYTES)
        self.server = Directory(tmp_path / "served")
        self.directory = tmp_path / "cache"
        self.seen: list[Event] = []
        self.limit_bytes = limit_bytes

    def ensure(self) -> Path:
        """With a cache made anew, as after a restart."""
        cache = BundleCache(
            self.directory, VirtualClock(), limit_bytes=self.limit_bytes, observe=self.seen.append
        )
        transport: Transport = self.server  # type: ignore[assignment]  # a cache asks for bundle files alone
        return asyncio.run(cache.ensure(transport, self.digest)).directory

    def base(self) -> Path:
        return self.directory / self.digest / "base.bin"


def test_a_bundle_is_downloaded_once(tmp_path: Path) -> None:
    place = Place(tmp_path)
    directory = place.ensure()
    assert open_bundle(directory).digest == place.digest
    assert sorted(place.server.asked) == [
        (n, 0) for n in ("base.bin", "eval.onnx", MANIFEST, "step.onnx", "tokenizer.json")
    ], "all but the first factors"
    place.server.asked.clear()
    place.ensure()
    assert place.server.asked == []


def test_a_download_goes_on_where_it_broke_off(tmp_path: Path) -> None:
    place = Place(tmp_path)
    place.server.breaks_after = 100_000
    for kept in (100_000, 200_000):
        with pytest.raises(Unreachable):
            place.ensure()
        assert place.base().with_name("base.bin.part").stat().st_size == kept
    place.ensure()
    assert [offset for name, offset in place.server.asked if name == "base.bin"] == [0, 100_000, 200_000]
    assert place.base().read_bytes() == (tmp_path / "served" / "base.bin").read_bytes()


def test_a_stream_that_ends_early_is_not_taken_for_the_whole(tmp_path: Path) -> None:
    place = Place(tmp_path)
    served = tmp_path / "served" / "base.bin"
    whole = served.read_bytes()
    served.write_bytes(whole[:-1])
    with pytest.raises(Unreachable, match=f"base.bin broke off after {BASE_BYTES - 1} of {BASE_BYTES} bytes"):
        place.ensure()
    served.write_bytes(whole)
    place.ensure()


def test_a_damaged_part_left_by_a_crash_is_thrown_away(tmp_path: Path) -> None:
    place = Place(tmp_path)
    place.base().parent.mkdir(parents=True)
    place.base().with_name("base.bin.part").write_bytes(b"garbage" * 1000)
    place.ensure()
    assert [o for n, o in place.server.asked if n == "base.bin"] == [7000, 0]
    assert events.Redownloading(file="base.bin") in place.seen


def test_a_part_longer_than_the_file_begins_anew(tmp_path: Path) -> None:
    place = Place(tmp_path)
    place.base().parent.mkdir(parents=True)
    place.base().with_name("base.bin.part").write_bytes(bytes(BASE_BYTES + 1))
    place.ensure()
    assert [o for n, o in place.server.asked if n == "base.bin"] == [0]


@pytest.mark.parametrize("name", ["base.bin", MANIFEST])
def test_a_cached_file_that_is_damaged_is_downloaded_again_with_a_message(tmp_path: Path, name: str) -> None:
    place = Place(tmp_path)
    path = place.ensure() / name
    path.write_bytes(b"x" + path.read_bytes()[1:])
    place.server.asked.clear()
    place.ensure()
    assert place.server.asked == [(name, 0)]
    assert events.Redownloading(file=name) in place.seen


def test_a_file_the_server_damages_each_time_is_refused_and_not_kept(tmp_path: Path) -> None:
    place = Place(tmp_path)
    place.server.damages = {"base.bin"}
    with pytest.raises(BundleError, match=r"base\.bin of bundle .* does not match its sha256"):
        place.ensure()
    assert not place.base().exists()
    assert not place.base().with_name("base.bin.part").exists()


def test_a_manifest_of_another_bundle_is_refused(tmp_path: Path) -> None:
    place = Place(tmp_path)
    place.server.damages = {MANIFEST}
    with pytest.raises(BundleError, match="does not match the bundle's name"):
        place.ensure()


def test_a_server_that_never_stops_sending_is_cut_off(tmp_path: Path) -> None:
    place = Place(tmp_path)
    place.server.endless = True
    with pytest.raises(BundleError, match="longer than a manifest may be"):
        place.ensure()
    place.server.endless = False
    place.ensure()
    place.base().unlink()
    place.server.endless = True
    with pytest.raises(BundleError, match=f"base.bin .* has {BASE_BYTES + 1} bytes instead of {BASE_BYTES}"):
        place.ensure()


def test_a_bundle_over_the_limit_is_refused_before_it_comes(tmp_path: Path) -> None:
    place = Place(tmp_path, limit_bytes=BASE_BYTES)
    with pytest.raises(BundleError, match=r"needs 1 MiB, the cache may hold 1 MiB .* raise its limit"):
        place.ensure()
    assert [name for name, _ in place.server.asked] == [MANIFEST]


def test_the_longest_unused_bundle_makes_room(tmp_path: Path) -> None:
    place = Place(tmp_path, limit_bytes=BASE_BYTES * 2)
    old, older = (
        other_bundle(place, name, BASE_BYTES // 2 + 1, used_at) for name, used_at in [("a", 2), ("b", 1)]
    )
    place.ensure()
    assert (old.exists(), older.exists(), place.base().exists()) == (True, False, True)


def test_what_is_no_bundle_neither_goes_nor_counts(tmp_path: Path) -> None:
    place = Place(tmp_path, limit_bytes=BASE_BYTES * 2)
    photos = place.directory / "photos"
    (photos / "2024").mkdir(parents=True)
    (photos / "holiday.jpg").write_bytes(bytes(BASE_BYTES * 3))
    other = other_bundle(place, "a", BASE_BYTES // 2, used_at=1)
    place.ensure()
    assert (photos / "2024").is_dir()
    assert (photos / "holiday.jpg").stat().st_size == BASE_BYTES * 3
    assert other.exists(), "there was room beside it"


def other_bundle(place: Place, digit: str, size: int, used_at: float) -> Path:
    """A bundle in the cache that another process brought there; its name is one digit, again and again."""
    directory = place.directory / (digit * 64)
    directory.mkdir(parents=True)
    (directory / "base.bin").write_bytes(bytes(size))
    os.utime(directory, (used_at, used_at))
    return directory


def test_a_bundle_that_another_process_is_fetching_is_not_removed(tmp_path: Path) -> None:
    place = Place(tmp_path, limit_bytes=BASE_BYTES * 2)
    fetched = other_bundle(place, "a", BASE_BYTES // 2 + 1, used_at=1)
    idle = other_bundle(place, "b", BASE_BYTES // 2 + 1, used_at=2)
    held = try_lock(fetched.with_name(f"{fetched.name}.lock"))
    assert held is not None
    place.ensure()
    os.close(held)
    assert (fetched.exists(), idle.exists()) == (True, False)


def test_where_all_others_are_in_use_the_bundle_is_refused_and_they_stay(tmp_path: Path) -> None:
    place = Place(tmp_path, limit_bytes=BASE_BYTES + 10_000)
    fetched = other_bundle(place, "a", BASE_BYTES // 2, used_at=1)
    held = try_lock(fetched.with_name(f"{fetched.name}.lock"))
    assert held is not None
    with pytest.raises(BundleError, match="with what is in use: raise its limit with --cache-limit-mb"):
        place.ensure()
    os.close(held)
    assert fetched.exists()
    place.ensure()
    assert not fetched.exists()


def test_using_a_bundle_makes_it_the_last_to_go(tmp_path: Path) -> None:
    place = Place(tmp_path)

    async def run() -> list[float]:
        cache = BundleCache(place.directory, VirtualClock())
        used_at: list[float] = []
        for _ in range(2):
            directory = (await cache.ensure(place.server, place.digest)).directory  # type: ignore[arg-type]
            used_at.append(directory.stat().st_mtime)
            os.utime(directory, (1, 1))
        return used_at

    assert min(asyncio.run(run())) > 1_000_000_000, "each use is stamped with today's time"


def test_a_bundle_makes_room_once_the_work_on_it_is_done(tmp_path: Path) -> None:
    place = Place(tmp_path)
    second = tmp_path / "second"
    second_digest = write_small_bundle(second, BASE_BYTES - 1)

    async def run() -> None:
        cache = BundleCache(place.directory, VirtualClock(), limit_bytes=BASE_BYTES * 2 - 1)
        with cache.using(place.digest):
            opened = await cache.ensure(place.server, place.digest)  # type: ignore[arg-type]
            with pytest.raises(BundleError, match="with what is in use"):
                await cache.ensure(Directory(second), second_digest)  # type: ignore[arg-type]
            assert open_bundle(opened.directory).digest == place.digest
        await cache.ensure(Directory(second), second_digest)  # type: ignore[arg-type]

    asyncio.run(run())
    assert {path.name for path in place.directory.iterdir()} == {second_digest, f"{second_digest}.lock"}


@pytest.mark.parametrize("refused", ["unreadable", "declined", "too large"])
def test_of_a_bundle_that_is_not_taken_nothing_stays(refused: str, tmp_path: Path) -> None:
    place = Place(tmp_path, limit_bytes=BASE_BYTES if refused == "too large" else 1 << 30)
    if refused == "unreadable":
        (manifest := place.server.directory / MANIFEST).write_bytes(b"{".ljust(1 << 20))
        place.digest = bundle_digest(manifest.read_bytes())
    cache = BundleCache(place.directory, VirtualClock(), limit_bytes=place.limit_bytes)
    limit_bytes = 1 if refused == "declined" else None
    with pytest.raises((BundleError, Declined)):
        asyncio.run(cache.ensure(place.server, place.digest, None, limit_bytes))  # type: ignore[arg-type]
    assert list(place.directory.iterdir()) == []


def test_a_lock_whose_file_was_removed_meanwhile_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, taken = tmp_path / "lock", fcntl.flock

    def late(descriptor: int, operation: int) -> None:
        path.unlink()  # by whoever held it, between opening and locking
        taken(descriptor, operation)

    with monkeypatch.context() as patched:
        patched.setattr(fcntl, "flock", late)
        assert try_lock(path) is None
    assert try_lock(path) is not None


def test_a_bundle_that_another_process_removed_is_downloaded_again(tmp_path: Path) -> None:
    place = Place(tmp_path)

    async def run() -> None:
        cache = BundleCache(place.directory, VirtualClock())
        await cache.ensure(place.server, place.digest)  # type: ignore[arg-type]
        shutil.rmtree(place.directory / place.digest)
        again = await cache.ensure(place.server, place.digest)  # type: ignore[arg-type]
        assert open_bundle(again.directory).digest == place.digest

    asyncio.run(run())


def test_a_file_that_vanishes_while_sizes_are_summed_counts_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = Place(tmp_path, limit_bytes=BASE_BYTES * 2)
    other = other_bundle(place, "a", 1000, used_at=1)
    listed = Path.iterdir

    def and_then_gone(directory: Path) -> Iterator[Path]:
        found = list(listed(directory))
        if directory == other:
            (other / "base.bin").unlink()
        return iter(found)

    monkeypatch.setattr(Path, "iterdir", and_then_gone)
    place.ensure()


@pytest.mark.parametrize("limit_bytes", [0, -1])
def test_a_cache_of_no_size_is_refused_when_it_is_made(tmp_path: Path, limit_bytes: int) -> None:
    with pytest.raises(ConfigError, match=r"cache_limit_bytes = .*--cache-limit-mb counts in MiB"):
        BundleCache(tmp_path, VirtualClock(), limit_bytes=limit_bytes)


def test_another_process_at_the_same_bundle_is_waited_for(tmp_path: Path) -> None:
    place = Place(tmp_path)
    place.directory.mkdir()
    held = try_lock(place.directory / f"{place.digest}.lock")
    assert held is not None
    clock = VirtualClock()

    async def run() -> int:
        cache = BundleCache(place.directory, clock)
        waiting = asyncio.create_task(cache.ensure(place.server, place.digest))  # type: ignore[arg-type]
        while len(clock.slept_s) < 3:
            await asyncio.sleep(0)
        before = len(place.server.asked)
        os.close(held)
        await waiting
        return before

    assert asyncio.run(run()) == 0


def test_whoever_is_cancelled_while_it_takes_the_lock_leaves_it_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, taking, go_on = Place(tmp_path), threading.Event(), threading.Event()

    def slow(path: Path) -> int | None:
        descriptor = try_lock(path)
        taking.set()
        go_on.wait(10)
        return descriptor

    async def cancelled() -> None:
        transport: Transport = place.server  # type: ignore[assignment]
        cache = BundleCache(place.directory, VirtualClock())
        task = asyncio.create_task(cache.ensure(transport, place.digest))
        await asyncio.to_thread(taking.wait, 10)
        task.cancel()
        await asyncio.sleep(0.01)
        go_on.set()
        with pytest.raises(asyncio.CancelledError):
            await task

    with monkeypatch.context() as patched:
        patched.setattr(bundle_cache, "try_lock", slow)
        asyncio.run(cancelled())
    place.directory.mkdir(exist_ok=True)
    descriptor = try_lock(place.directory / f"{place.digest}.lock")
    assert descriptor is not None
    os.close(descriptor)
    assert place.server.asked == []


def test_two_devices_of_one_process_share_a_download(tmp_path: Path) -> None:
    place = Place(tmp_path)

    async def run() -> None:
        cache = BundleCache(place.directory, VirtualClock())
        both = await asyncio.gather(*(cache.ensure(place.server, place.digest) for _ in range(2)))  # type: ignore[arg-type]
        assert both[0] is both[1]

    asyncio.run(run())
    assert len(place.server.asked) == 5
