"""A disk, mounted in memory, on which a bundle has no room: what is on it already goes on."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncGenerator, Callable
from pathlib import Path

import pytest

from edge_client import events
from edge_client.bundle_cache import BundleCache
from edge_client.bundle_download import RESERVE_BYTES, append
from edge_client.events import Step, ignore
from fedtt.errors import DiskFullError
from fedtt.manifest import MANIFEST, FileEntry
from fedtt.seams import Transport
from tests.support.clock import VirtualClock
from tests.support.device_world import World, acknowledged, in_world
from tests.support.disks import fill, mounted, remount
from tests.support.edge import write_small_bundle

MIB = 1 << 20
BASE_BYTES = 24 * MIB


class Server:
    """The bundle half of a Transport: sends MiB after MiB of the files in a directory."""

    def __init__(self, directory: Path) -> None:
        self.digest = write_small_bundle(directory, BASE_BYTES)
        self.asked: list[tuple[str, int]] = []
        self.after: Callable[[int], None] = lambda _: None  #: called with how many MiB of the base were sent
        self._directory = directory

    async def bundle_file(self, bundle: str, name: str, offset: int) -> AsyncGenerator[bytes, None]:
        self.asked.append((name, offset))
        data = (self._directory / name).read_bytes()
        for number, start in enumerate(range(offset, len(data), MIB)):
            yield data[start : start + MIB]
            if name == "base.bin":
                self.after(number + 1)

    def bring(self, disk: Path) -> Path:
        """Its bundle to a cache made anew, as after a restart."""
        transport: Transport = self  # type: ignore[assignment]  # a cache asks for bundle files alone
        return asyncio.run(BundleCache(disk, VirtualClock()).ensure(transport, self.digest)).directory


def older_bundle(disk: Path, size_bytes: int, letter: str = "a") -> Path:
    directory = disk / (letter * 64)
    directory.mkdir()
    (directory / "base.bin").write_bytes(bytes(size_bytes))
    return directory


def test_a_device_whose_disk_is_too_small_lets_the_lease_go_and_works_once_there_is_room(
    tmp_path: Path,
) -> None:
    def dropped(step: Step) -> bool:
        return isinstance(step, events.Dropped)

    async def test(world: World) -> None:
        device, transport = world.device()
        retrying = await device.run(lambda step: isinstance(step, events.Retrying))
        assert isinstance(retrying, events.Retrying)
        assert "has no room for bundle" in retrying.error
        assert list(world.home.bundles.iterdir()) == []
        async with asyncio.timeout(60):
            await device.run(dropped)  # nothing came of the base's 250,000 bytes: the journal has room
        assert set(transport.calls) == {"enroll", "check_in", "bundle_file"}
        await world.service.tick()  # its round is over, too
        remount(world.home.directory, "size=32m")
        async with asyncio.timeout(60):
            await device.run(acknowledged)

    with mounted(tmp_path / "home", "size=220k"):
        in_world(tmp_path, test)


def test_a_bundle_that_the_disk_cannot_hold_beside_its_reserve_is_not_begun(tmp_path: Path) -> None:
    server = Server(tmp_path / "served")
    with mounted(tmp_path / "disk", "size=39m") as disk:
        with pytest.raises(DiskFullError, match="needs 25 MiB, and 16 MiB that stay free: free some"):
            server.bring(disk)
        assert list(disk.iterdir()) == []
        assert server.asked == [(MANIFEST, 0)]
        remount(disk, "size=42m")
        server.bring(disk)


def test_the_longest_unused_bundle_makes_room_on_the_disk_unless_that_is_in_vain(tmp_path: Path) -> None:
    server = Server(tmp_path / "served")
    with mounted(tmp_path / "disk", "size=50m") as disk:
        older = older_bundle(disk, 20 * MIB)
        (disk / "photos").write_bytes(bytes(20 * MIB))
        with pytest.raises(DiskFullError):
            server.bring(disk)
        assert older.exists()
        (disk / "photos").unlink()
        server.bring(disk)
        assert not older.exists()


def test_no_bundle_goes_where_what_is_in_use_would_have_to_go_too(tmp_path: Path) -> None:
    server = Server(tmp_path / "served")
    with mounted(tmp_path / "disk", "size=50m") as disk:
        used, idle = older_bundle(disk, 14 * MIB), older_bundle(disk, 6 * MIB, "b")
        cache = BundleCache(disk, VirtualClock())
        with cache.using(used.name), pytest.raises(DiskFullError, match="has no room for bundle"):
            asyncio.run(cache.ensure(server, server.digest))  # type: ignore[arg-type]
        assert idle.exists()


def test_a_download_gives_room_back_where_others_fill_the_disk_and_goes_on_with_the_rest(
    tmp_path: Path,
) -> None:
    server = Server(tmp_path / "served")
    with mounted(tmp_path / "disk", "size=64m") as disk:
        server.after = lambda sent: fill(disk) if sent == 20 else None
        with pytest.raises(DiskFullError, match=r"base\.bin\.part cannot be used \(No space left"):
            server.bring(disk)
        assert shutil.disk_usage(disk).free >= RESERVE_BYTES
        with pytest.raises(DiskFullError, match="has no room for"):
            server.bring(disk)
        (disk / "filler").unlink()
        server.after = lambda _: None
        server.bring(disk)
    assert [offset for name, offset in server.asked if name == "base.bin"] == [0, 20 * MIB - RESERVE_BYTES]


def test_a_download_that_is_cancelled_on_a_full_disk_ends_as_cancelled(tmp_path: Path) -> None:
    class Cancelled:
        async def bundle_file(self, bundle: str, name: str, offset: int) -> AsyncGenerator[bytes, None]:
            yield bytes(100)
            fill(tmp_path / "disk")
            raise asyncio.CancelledError

    transport: Transport = Cancelled()  # type: ignore[assignment]  # bundle files alone are asked for
    entry = FileEntry(bytes=1000, sha256="0" * 64)
    with mounted(tmp_path / "disk", "size=1m") as disk:
        part = disk / "base.bin.part"
        with pytest.raises(asyncio.CancelledError):
            asyncio.run(append(transport, "a" * 64, "base.bin", entry, part, ignore))
        assert part.stat().st_size == 100


def test_a_bundle_that_is_there_needs_no_room(tmp_path: Path) -> None:
    server = Server(tmp_path / "served")
    with mounted(tmp_path / "disk", "size=64m") as disk:
        server.bring(disk)
        server.asked.clear()
        fill(disk)
        server.bring(disk)
    assert server.asked == []
