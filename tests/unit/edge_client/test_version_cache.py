from __future__ import annotations

import os
from pathlib import Path

import pytest

from edge_client.version_cache import FileVersions, Held, MemoryVersions, VersionCache
from fedtt.errors import StorageError
from fedtt.wire import version_digest


def version(data: bytes) -> Held:
    return Held(version_digest(data), data)


class VersionCacheContract:
    """Tests of `VersionCache`; a subclass makes an empty one."""

    def empty(self, tmp_path: Path) -> VersionCache:
        raise NotImplementedError

    def pass_time(self, tmp_path: Path) -> None:
        """Make sure that what is kept next is newer by this file system's clock."""

    def test_the_last_one_is_kept_for_each_key(self, tmp_path: Path) -> None:
        versions = self.empty(tmp_path)
        assert versions.get("lights:a", 4) is None
        for data in (b"old1", b"new1"):
            versions.put("lights:a", version(data))
        versions.put("lights:b", version(b"other"))
        assert versions.get("lights:a", 4) == version(b"new1")
        assert versions.get("lights:b", 5) == version(b"other")

    @pytest.mark.parametrize("size_bytes", [0, 3, 5])
    def test_one_of_another_size_is_none(self, size_bytes: int, tmp_path: Path) -> None:
        versions = self.empty(tmp_path)
        versions.put("lights:a", version(b"four"))
        assert versions.get("lights:a", size_bytes) is None

    def test_a_few_are_kept_and_the_longest_unchanged_make_room(self, tmp_path: Path) -> None:
        versions = self.empty(tmp_path)
        for key in ("a", "b", "c", "d", "a", "e"):
            versions.put(key, version(key.encode()))
            self.pass_time(tmp_path)
        assert versions.get("b", 1) is None
        assert [versions.get(key, 1) for key in "acde"] == [version(key.encode()) for key in "acde"]

    def test_a_key_may_be_any_text(self, tmp_path: Path) -> None:
        versions = self.empty(tmp_path)
        keys = ("", "../../x", "a/b", "ä\0" * 300)
        for key in keys:
            versions.put(key, version(key.encode()))
        assert [versions.get(key, len(key.encode())) for key in keys] == [
            version(key.encode()) for key in keys
        ]


class TestMemoryVersions(VersionCacheContract):
    def empty(self, tmp_path: Path) -> VersionCache:
        return MemoryVersions()


class TestFileVersions(VersionCacheContract):
    def empty(self, tmp_path: Path) -> VersionCache:
        return FileVersions(tmp_path / "versions")

    def pass_time(self, tmp_path: Path) -> None:
        for file in (tmp_path / "versions").iterdir():
            changed_at = file.stat().st_mtime_ns - 10**9
            os.utime(file, ns=(changed_at, changed_at))

    def test_another_process_finds_them_and_others_may_not_read_them(self, tmp_path: Path) -> None:
        self.empty(tmp_path).put("a", version(b"data"))
        assert self.empty(tmp_path).get("a", 4) == version(b"data")
        (file,) = (tmp_path / "versions").iterdir()
        assert file.stat().st_mode & 0o777 == 0o600
        assert file.parent.stat().st_mode & 0o777 == 0o700

    def test_what_a_crash_left_half_written_is_not_the_version_and_is_cleared_away(
        self, tmp_path: Path
    ) -> None:
        versions = self.empty(tmp_path)
        versions.put("a", version(b"data"))
        (file,) = (tmp_path / "versions").iterdir()
        half = file.with_name(file.name + ".new")
        half.write_bytes(b"da")
        assert versions.get("a", 4) == version(b"data")
        self.pass_time(tmp_path)
        for key in "abcde":
            versions.put(key, version(b"data"))
        assert not half.exists()
        assert len(list((tmp_path / "versions").iterdir())) == 4

    def test_a_file_in_the_place_of_the_directory_is_a_clear_error(self, tmp_path: Path) -> None:
        (tmp_path / "versions").write_text("")
        versions = self.empty(tmp_path)
        with pytest.raises(StorageError, match="a file stands where a directory should be"):
            versions.put("a", version(b"data"))
