from __future__ import annotations

import asyncio
import threading
from collections import Counter
from typing import BinaryIO

import numpy as np
import pytest

from aggregator.differences import Differences
from fedtt.codec.difference import decode_difference
from fedtt.errors import StorageError
from fedtt.wire import zeros_digest
from storage.blobs import MemoryBlobs, save

SIZE = 1000


class Watched(MemoryBlobs):
    """Blobs that count how often each is read, and how many are read at the same time."""

    def __init__(self) -> None:
        super().__init__()
        self.opened: Counter[str] = Counter()
        self.threads: set[int] = set()

    def open(self, sha256: str) -> BinaryIO:
        self.opened[sha256] += 1
        self.threads.add(threading.get_ident())
        return super().open(sha256)


def version(seed: int, near: float | None = None) -> bytes:
    """Random factors; those of seed 0 moved a little where `near` says how far."""
    rng = np.random.default_rng(seed)
    noise = rng.normal(size=SIZE)
    theta = noise if near is None else np.random.default_rng(0).normal(size=SIZE) + near * noise
    return theta.astype("<f4").tobytes()


async def test_a_difference_gives_the_new_version_to_who_holds_the_old_one() -> None:
    blobs = Watched()
    base, new = version(0), version(1, near=1e-3)
    found = await Differences(blobs).between(save(blobs, base), save(blobs, new))
    assert found is not None
    assert decode_difference(base, found) == new
    assert len(found) < len(new)


async def test_many_who_ask_for_the_same_cost_one_computation_off_the_event_loop() -> None:
    blobs = Watched()
    names = [save(blobs, version(seed, near=1e-3)) for seed in range(3)]
    differences = Differences(blobs)
    pairs = [(names[0], names[1]), (names[0], names[2])] * 20
    found = await asyncio.gather(*(differences.between(*pair) for pair in pairs))
    assert len(set(found)) == 2
    assert blobs.opened == {names[0]: 2, names[1]: 1, names[2]: 1}
    assert threading.get_ident() not in blobs.threads


async def test_unlike_versions_have_none_and_that_is_remembered_too() -> None:
    blobs = Watched()
    noise = [np.random.default_rng(seed).bytes(4 * SIZE) for seed in (1, 2)]
    base, new, short = (save(blobs, data) for data in (*noise, bytes(8)))
    differences = Differences(blobs)
    for held in (base, short):
        assert [await differences.between(held, new) for _ in range(3)] == [None] * 3
    assert blobs.opened == {base: 1, short: 1, new: 2}


async def test_those_longest_unused_make_room() -> None:
    blobs = Watched()
    base, *others = (save(blobs, version(seed, near=1e-3)) for seed in range(4))
    one = await Differences(blobs).between(base, others[0])
    assert one is not None
    differences = Differences(blobs, limit_bytes=2 * (len(one) + 600))
    blobs.opened.clear()
    for number in (0, 1, 0, 2, 0, 1):  # 2 takes the place of 1, which has to be computed again
        assert await differences.between(base, others[number]) is not None
    assert [blobs.opened[other] for other in others] == [1, 2, 1]


async def test_one_that_is_longer_than_the_limit_is_still_given() -> None:
    blobs = Watched()
    base, new, other = (save(blobs, version(seed, near=1e-3)) for seed in range(3))
    differences = Differences(blobs, limit_bytes=1)
    found = [await differences.between(base, wanted) for wanted in (new, other, new)]
    assert found[0] == found[2] != found[1]


async def test_a_damaged_old_version_is_told_to_whoever_runs_the_server(
    caplog: pytest.LogCaptureFixture,
) -> None:
    blobs = Watched()
    base, new = (save(blobs, version(seed, near=1e-3)) for seed in range(2))
    blobs._blobs[base] = b"damaged"
    assert await Differences(blobs).between(base, new) is None
    assert "is damaged where it is stored: restore it from a backup" in caplog.text


async def test_a_new_version_that_is_missing_is_an_error_and_not_remembered() -> None:
    blobs = Watched()
    base, new = (save(blobs, version(seed, near=1e-3)) for seed in range(2))
    blobs.delete(new)
    differences = Differences(blobs)
    with pytest.raises(StorageError, match="there is no blob"):
        await differences.between(base, new)
    save(blobs, version(1, near=1e-3))
    assert await differences.between(base, new) is not None


async def test_who_holds_no_version_holds_zeros_which_are_stored_nowhere() -> None:
    blobs = Watched()
    new = (np.rint(128 * np.random.default_rng(0).normal(size=SIZE)) / 128 + 0.0).astype("<f4").tobytes()
    found = await Differences(blobs).between(zeros_digest(len(new)), save(blobs, new))
    assert found is not None
    assert len(found) < 0.5 * len(new)
    assert decode_difference(bytes(len(new)), found) == new
