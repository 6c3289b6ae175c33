"""How a device comes by the version of its plan: held, rebuilt from a difference, or whole."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import numpy as np
import pytest

from edge_client import events
from edge_client.events import Step
from edge_client.tokens import Batch
from fedtt.codec.difference import encode_difference
from fedtt.layout import Theta
from fedtt.seams import VersionBody
from fedtt.wire import encode_theta, version_digest, zeros_digest
from tests.support.device_world import Hooked, World, device_world
from tests.support.edge import MeanTarget
from tests.support.tiny import tiny_spec

SIZE = tiny_spec().layout.size
FIRST = encode_theta(np.zeros(SIZE, np.float32))
ZEROS = zeros_digest(len(FIRST))  #: what a device asks with that holds no version


def in_world(tmp_path: Path, test: Callable[[World], Awaitable[None]]) -> None:
    async def run() -> None:
        async with device_world(tmp_path) as world:
            await test(world)

    asyncio.run(run())


def acknowledged(times: int) -> Callable[[Step], bool]:
    """True of the step that makes it so many acknowledged updates."""
    left = [times]

    def until(step: Step) -> bool:
        left[0] -= isinstance(step, events.Acknowledged)
        return not left[0]

    return until


def watch(transport: Hooked, damage: Callable[[bytes], bytes] = bytes) -> list[tuple[str | None, bool]]:
    """What is asked for with what in hand, and whether a difference came; `damage` is done to those."""
    inner, seen = transport.version, list[tuple[str | None, bool]]()

    async def version(sha256: str, limit_bytes: int, held: str | None = None) -> VersionBody:
        body = await inner(sha256, limit_bytes, held)
        seen.append((held, body.difference))
        return VersionBody(data=damage(body.data), difference=True) if body.difference else body

    transport.version = version  # type: ignore[method-assign]
    return seen


def kept(world: World) -> Path:
    (file,) = world.home.versions.iterdir()
    return file


def test_the_next_version_comes_as_a_difference_from_the_last_and_is_kept_in_its_place(
    tmp_path: Path,
) -> None:
    async def test(world: World) -> None:
        device, transport = world.device()
        seen = watch(transport)
        await device.run(until=acknowledged(1))
        assert kept(world).read_bytes() == FIRST
        name = world.version()[1]
        await device.run(until=acknowledged(1))
        assert seen == [(ZEROS, True), (version_digest(FIRST), True)]
        assert version_digest(kept(world).read_bytes()) == name

    in_world(tmp_path, test)


class Death(BaseException):
    """Of the process, which nothing catches."""


class CrashingOnce(MeanTarget):
    def gradient(self, theta: Theta, batch: Batch) -> tuple[float, Theta]:
        if not self.batches:
            self.batches.append(batch)
            raise Death
        return super().gradient(theta, batch)


def test_a_version_that_is_held_is_not_downloaded_again(tmp_path: Path) -> None:
    async def test(world: World) -> None:
        world.runtime = CrashingOnce()
        with pytest.raises(Death):
            await world.device()[0].run()
        device, transport = world.device()
        await device.run(until=acknowledged(1))
        assert "version" not in transport.calls

    in_world(tmp_path, test)


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "a flipped bit": lambda data: data[:-1] + bytes([data[-1] ^ 1]),
    "cut short": lambda data: data[:-4],
    "too long": lambda data: data + bytes(4),
    "empty": lambda data: b"",
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_file_means_a_download_as_with_none(
    tmp_path: Path, damage: Callable[[bytes], bytes]
) -> None:
    async def test(world: World) -> None:
        await world.device()[0].run(until=acknowledged(1))
        kept(world).write_bytes(damage(FIRST))
        name = world.version()[1]
        device, transport = world.device()
        seen = watch(transport)
        await device.run(until=acknowledged(1))
        ((held, difference),) = seen
        assert (held, difference) in {(ZEROS, True), (version_digest(damage(FIRST)), False)}
        assert version_digest(kept(world).read_bytes()) == name

    in_world(tmp_path, test)


def test_without_its_files_a_device_holds_zeros(tmp_path: Path) -> None:
    async def test(world: World) -> None:
        await world.device()[0].run(until=acknowledged(1))
        kept(world).unlink()
        device, transport = world.device()
        seen = watch(transport)
        await device.run(until=acknowledged(1))
        assert seen == [(ZEROS, True)]

    in_world(tmp_path, test)


OTHER = encode_theta(np.ones(SIZE, np.float32))
WRONG: dict[str, Callable[[bytes], bytes]] = {
    "no zlib": lambda data: b"<html>log in to the hotel's network",
    "cut short": lambda data: data[:-1],
    "of another version": lambda data: encode_difference(FIRST, OTHER),
}


@pytest.mark.parametrize("damage", WRONG.values(), ids=WRONG)
def test_a_difference_that_does_not_give_the_version_is_made_good_by_the_whole(
    tmp_path: Path, damage: Callable[[bytes], bytes]
) -> None:
    async def test(world: World) -> None:
        device, transport = world.device()
        await device.run(until=acknowledged(1))
        name = world.version()[1]
        seen = watch(transport, damage)
        await device.run(until=acknowledged(1))
        assert seen == [(version_digest(FIRST), True), (None, False)]
        assert version_digest(kept(world).read_bytes()) == name
        assert world.kinds().count("Retrying") == 0

    in_world(tmp_path, test)
