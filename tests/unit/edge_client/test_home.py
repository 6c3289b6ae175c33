from __future__ import annotations

import os
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from edge_client.home import Home
from edge_client.identity import Identity
from fedtt.errors import StorageError
from fedtt.messages import device_id
from tests.support.disks import mounted


def test_two_clients_cannot_run_on_one_directory(tmp_path: Path) -> None:
    first, second = Home(tmp_path / "home"), Home(tmp_path / "home")
    assert not first.is_running()
    with first.lock():
        assert second.is_running()
        with (
            pytest.raises(StorageError, match=r"another client is running on .*home: stop it first"),
            second.lock(),
        ):
            pass
    with second.lock():
        pass


def test_the_home_is_open_to_its_owner_alone(tmp_path: Path) -> None:
    home = Home(tmp_path / "home")
    home.create()
    assert home.directory.stat().st_mode & 0o777 == 0o700


def test_a_file_in_the_place_of_the_home_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "home").write_text("")
    with pytest.raises(StorageError, match="a file stands where a directory should be"):
        Home(tmp_path / "home").create()


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_read_only_place_is_a_clear_error(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(StorageError, match="give this user write access"):
        Home(tmp_path / "home").create()


def test_switches_are_seen_by_others_and_can_be_set_twice(tmp_path: Path) -> None:
    home, other = Home(tmp_path), Home(tmp_path)
    for value in (True, True, False, False):
        home.pause(value)
        home.stop(value)
        assert (other.is_paused(), other.is_stopping()) == (value, value)


def test_deleting_a_home_leaves_nothing_of_ours_and_all_that_is_not(tmp_path: Path) -> None:
    home = Home(tmp_path / "home")
    home.create()
    Identity.open(home)
    for directory in (home.bundles, home.versions):
        (directory / "x").mkdir(parents=True)
    for name in ("examples.db", "examples.db-wal", "state"):
        (home.directory / name).write_text("")
    home.pause(True)
    (home.directory / "holiday.jpg").write_text("")
    home.delete()
    assert [path.name for path in home.directory.iterdir()] == ["holiday.jpg"]
    (home.directory / "holiday.jpg").unlink()
    home.delete()
    assert not home.exists


def test_a_key_is_made_once_and_kept_private(tmp_path: Path) -> None:
    home = Home(tmp_path)
    made = Identity.open(home)
    assert home.key.stat().st_mode & 0o777 == 0o600
    assert Identity.open(home).device == made.device == device_id(made.public_key)


def test_a_key_is_written_as_the_library_writes_it_and_read_as_it_reads_it(tmp_path: Path) -> None:
    from cryptography.hazmat.primitives import serialization

    made = Identity.open(home := Home(tmp_path))
    found = serialization.load_pem_private_key(home.key.read_bytes(), password=None)
    assert isinstance(found, Ed25519PrivateKey)
    assert found.public_key().public_bytes_raw() == made.public_key
    forms = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    assert found.private_bytes(*forms) == home.key.read_bytes()


def test_a_key_that_others_can_read_is_refused(tmp_path: Path) -> None:
    home = Home(tmp_path)
    Identity.open(home)
    home.key.chmod(0o640)
    with pytest.raises(StorageError, match="chmod 600"):
        Identity.open(home)


X25519 = """-----BEGIN PRIVATE KEY-----
MC4CAQAwBQYDK2VuBCIEIAABAgMEBQYHCAkKCwwNDg8QERITFBUWFxgZGhscHR4f
-----END PRIVATE KEY-----
"""


@pytest.mark.parametrize(
    "content",
    [b"", b"-----BEGIN PRIVATE KEY-----\nxx\n-----END PRIVATE KEY-----\n", X25519.encode()],
    ids=["nothing", "no-key", "x25519"],
)
def test_a_damaged_key_is_a_clear_error(tmp_path: Path, content: bytes) -> None:
    home = Home(tmp_path)
    home.key.touch(mode=0o600)
    home.key.write_bytes(content)
    with pytest.raises(StorageError, match="is not an Ed25519 key in PEM"):
        Identity.open(home)


def test_a_signature_is_that_of_the_key_over_the_request(tmp_path: Path) -> None:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    from fedtt.signature import content_digest, parse_signature, signature_base

    identity = Identity.open(Home(tmp_path))
    headers = identity.sign(method="PUT", authority="a:1", path="/v1/x", body=b"body", created=7, nonce=9)
    claim, signature = parse_signature(
        "PUT", "a:1", "/v1/x", content_digest(b"body"), headers["Signature-Input"], headers["Signature"]
    )
    assert (claim.device, claim.created) == (identity.device, 7)
    Ed25519PublicKey.from_public_bytes(identity.public_key).verify(signature, signature_base(claim))


def test_a_new_home_and_what_lies_above_it_are_on_disk_before_anything_is_in_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced, fsync = list[int](), os.fsync

    def noting(descriptor: int) -> None:
        synced.append(os.fstat(descriptor).st_ino)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", noting)
    home = Home(tmp_path / "app" / "fedtt")
    home.create()
    assert set(synced) == {tmp_path.stat().st_ino, (tmp_path / "app").stat().st_ino}
    home.create()
    assert len(synced) == 2


def test_a_store_of_examples_goes_after_its_log(tmp_path: Path) -> None:
    with mounted(tmp_path / "disk", "size=1m") as disk:  # which lists the newest file first
        home = Home(disk)
        log = home.examples.with_name("examples.db-wal")
        log.mkdir()  # which cannot be unlinked, by root neither
        home.examples.touch()
        with pytest.raises(StorageError):
            home.delete_data()
        assert home.examples.exists()
        log.rmdir()
        home.delete_data()
        assert not home.examples.exists()
