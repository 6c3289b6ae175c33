from __future__ import annotations

import os
import resource
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pytest

from edge_client import activations
from edge_client.activations import FileActivations
from fedtt.errors import ConfigError

SHAPE = (5, 8)
BLOCK = 4096  #: what a file counts at least


def rows(seed: int) -> np.ndarray[tuple[int, ...], np.dtype[np.float16]]:
    return np.random.default_rng(seed).normal(size=SHAPE).astype(np.float16)


def test_what_was_kept_comes_back_to_the_bit_also_after_a_restart(tmp_path: Path) -> None:
    kept = FileActivations(tmp_path / "a", 1 << 20)
    assert kept.get("one", SHAPE) is None
    kept.put("one", rows(1))
    for cache in (kept, FileActivations(tmp_path / "a", 1 << 20)):
        found = cache.get("one", SHAPE)
        assert found is not None
        np.testing.assert_array_equal(found, rows(1))
    assert (tmp_path / "a" / "one").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(
    "damage", ["flipped", "cut", "longer", "empty", "of another name", "gone", "directory"]
)
def test_a_damaged_entry_is_dropped_and_never_given(damage: str, tmp_path: Path) -> None:
    kept = FileActivations(tmp_path, 1 << 20)
    kept.put("one", rows(1))
    kept.put("two", rows(2))
    path = tmp_path / "one"
    data = path.read_bytes()
    match damage:
        case "flipped":
            path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        case "cut":
            path.write_bytes(data[:-2])
        case "longer":
            path.write_bytes(data + b"  ")
        case "empty":
            path.write_bytes(b"")
        case "of another name":
            path.write_bytes((tmp_path / "two").read_bytes())
        case "gone":
            path.unlink()
        case "directory":
            path.unlink()
            path.mkdir()
    assert kept.get("one", SHAPE) is None
    if damage != "directory":
        assert not path.exists()
        kept.put("one", rows(3))
        np.testing.assert_array_equal(kept.get("one", SHAPE), rows(3))
    np.testing.assert_array_equal(kept.get("two", SHAPE), rows(2))


def test_an_entry_of_another_shape_is_not_given(tmp_path: Path) -> None:
    kept = FileActivations(tmp_path, 1 << 20)
    kept.put("one", rows(1))
    assert kept.get("one", (6, 8)) is None


def test_the_one_used_longest_ago_makes_way_also_after_a_restart(tmp_path: Path) -> None:
    kept = FileActivations(tmp_path, 3 * BLOCK)
    for number, name in enumerate(["one", "two", "three"]):
        kept.put(name, rows(number))
        os.utime(tmp_path / name, ns=(number, number))
    assert kept.get("one", SHAPE) is not None
    again = FileActivations(tmp_path, 3 * BLOCK)
    again.put("four", rows(4))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["four", "one", "three"]


def test_a_smaller_limit_holds_at_once_and_leftovers_of_a_crash_go(tmp_path: Path) -> None:
    kept = FileActivations(tmp_path, 3 * BLOCK)
    for name in ("one", "two", "three"):
        kept.put(name, rows(0))
    (tmp_path / "four.new").write_bytes(b"half")
    assert FileActivations(tmp_path, BLOCK).get("three", SHAPE) is not None
    assert [path.name for path in tmp_path.iterdir()] == ["three"]


def test_with_no_room_at_all_nothing_is_kept(tmp_path: Path) -> None:
    kept = FileActivations(tmp_path / "a", 0)
    kept.put("one", rows(1))
    assert kept.get("one", SHAPE) is None
    with pytest.raises(ConfigError):
        FileActivations(tmp_path, -1)


def test_where_the_directory_cannot_be_made_nothing_is_kept_and_nothing_fails(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    kept = FileActivations(tmp_path / "file" / "a", 1 << 20)
    kept.put("one", rows(1))
    assert kept.get("one", SHAPE) is None


def test_one_entry_that_cannot_be_removed_hides_no_other_from_the_limit(tmp_path: Path) -> None:
    kept = FileActivations(tmp_path, 4 * BLOCK)
    for number, name in enumerate(["one", "two", "three"]):
        kept.put(name, rows(number))
        os.utime(tmp_path / name, ns=(number, number))
    (tmp_path / "half.new").mkdir()
    (tmp_path / "half.new" / "file").write_bytes(b"")
    again = FileActivations(tmp_path, 2 * BLOCK)
    again.put("four", rows(4))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["four", "half.new"], (
        "which counts as one block"
    )


def test_where_what_cannot_be_removed_fills_the_directory_nothing_more_is_kept(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "file").write_bytes(b"")
    kept = FileActivations(tmp_path, BLOCK)
    for name in ("two", "three"):
        kept.put(name, rows(0))
        assert kept.get(name, SHAPE) is None
    assert [path.name for path in tmp_path.iterdir()] == ["one"]


def test_entries_that_vanish_while_the_directory_is_listed_hide_no_other_from_the_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = FileActivations(tmp_path, 3 * BLOCK)
    for number, name in enumerate(["one", "two", "three"]):
        kept.put(name, rows(number))
        os.utime(tmp_path / name, ns=(number, number))
    (tmp_path / "half.new").write_bytes(b"")
    listed = Path.iterdir

    def and_then_gone(directory: Path) -> Iterator[Path]:
        found = list(listed(directory))
        for name in ("two", "half.new"):
            (directory / name).unlink()
        return iter(found)

    again = FileActivations(tmp_path, 2 * BLOCK)
    with monkeypatch.context() as patched:
        patched.setattr(Path, "iterdir", and_then_gone)
        assert again.get("two", SHAPE) is None
    again.put("four", rows(4))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["four", "three"]


def test_a_directory_that_cannot_be_listed_now_is_listed_later(tmp_path: Path) -> None:
    FileActivations(tmp_path, BLOCK).put("one", rows(1))
    kept = FileActivations(tmp_path, BLOCK)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
    try:
        assert kept.get("one", SHAPE) is None
        kept.put("two", rows(2))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert kept.get("one", SHAPE) is not None
    kept.put("two", rows(2))
    assert [path.name for path in tmp_path.iterdir()] == ["two"]


def test_what_is_held_is_summed_once_and_then_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept, sums = FileActivations(tmp_path, 3 * BLOCK), list[int]()

    def summed(sizes: Iterable[int]) -> int:
        sums.append(sum(sizes))
        return sums[-1]

    monkeypatch.setattr(activations, "sum", summed, raising=False)
    for number in range(20):
        kept.put(str(number % 7), rows(number))
        if number % 3 == 0:
            (tmp_path / str(number % 7)).write_bytes(b"damaged")
            assert kept.get(str(number % 7), SHAPE) is None
    assert sums == [0]
    assert kept._held_bytes == sum(path.stat().st_blocks * 512 for path in tmp_path.iterdir())


def test_what_could_not_be_removed_counts_no_more_once_another_has_its_place(tmp_path: Path) -> None:
    kept = FileActivations(tmp_path, 2 * BLOCK)
    kept.put("one", rows(1))
    (tmp_path / "one").unlink()
    (tmp_path / "one").mkdir()
    assert kept.get("one", SHAPE) is None
    (tmp_path / "one").rmdir()
    kept.put("one", rows(1))
    kept.put("two", rows(2))
    assert kept.get("one", SHAPE) is not None
    assert kept.get("two", SHAPE) is not None
