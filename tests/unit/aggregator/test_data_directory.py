"""What a server keeps in its data directory beside the database."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import pytest

from aggregator.data_directory import server_directory
from aggregator.token_files import secret_file
from fedtt.errors import StorageError


def test_a_directory_is_made_for_its_owner_and_free_again_afterwards(tmp_path: Path) -> None:
    directory = tmp_path / "a" / "b"
    for _ in range(2):
        with server_directory(directory):
            assert directory.stat().st_mode & 0o777 == 0o700
            with pytest.raises(StorageError, match="another server runs on"), server_directory(directory):
                pass


def test_servers_that_share_a_database_share_a_directory_and_none_is_alone_there(tmp_path: Path) -> None:
    with (
        server_directory(tmp_path, alone=False),
        server_directory(tmp_path, alone=False),
        pytest.raises(StorageError, match="another server runs on"),
        server_directory(tmp_path),
    ):
        pass


def test_a_failing_server_frees_its_directory(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="bug"), server_directory(tmp_path):
        raise ValueError("bug")
    with server_directory(tmp_path):
        pass


def test_a_secret_is_made_once_random_and_readable_by_its_owner_alone(tmp_path: Path) -> None:
    secret = secret_file(tmp_path / "one")
    assert secret_file(tmp_path / "one") == secret
    assert (tmp_path / "one").stat().st_mode & 0o777 == 0o600
    assert secret_file(tmp_path / "two") != secret
    assert len(secret) == 48  # 24 bytes in hex: 24 · 2


def test_servers_that_start_at_the_same_time_make_one_secret(tmp_path: Path) -> None:
    together = Barrier(4)

    def make(number: int) -> str:
        together.wait()
        return secret_file(tmp_path / str(number))

    with ThreadPoolExecutor(4) as servers:
        for number in range(50):
            assert len(set(servers.map(make, [number] * 4))) == 1


def test_a_secret_that_a_person_wrote_is_kept(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("  my own\n")
    assert secret_file(tmp_path / "token") == "my own"


@pytest.mark.parametrize("data", [b"", b" \n", b"\xff"])
def test_a_secret_that_is_none_is_named(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "token").write_bytes(data)
    with pytest.raises(StorageError, match=r"token (is empty: delete it|cannot be read or made)"):
        secret_file(tmp_path / "token")
