"""Release keys: made, kept, and used to sign."""

from __future__ import annotations

from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from hypothesis import given
from hypothesis import strategies as st

from aggregator.server_key import ServerKey
from edge_client.release import check_manifest
from export.signing import read_key
from fedtt.cli import main
from fedtt.errors import BundleError, ConfigError
from fedtt.manifest import MANIFEST, bundle_digest, decode_manifest
from fedtt.release import manifest_claim, signed_manifest
from tests.support.edge import write_small_bundle


def test_the_commands_make_a_key_a_server_key_and_a_signed_bundle(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    release, server, bundle = tmp_path / "release.key", tmp_path / "server.key", tmp_path / "bundle"
    unsigned = write_small_bundle(bundle, base_bytes=10)
    assert main(["key", "create", "--out", str(release)]) == 0
    public = capsys.readouterr().out.strip()
    assert read_key(release).public_key().public_bytes_raw().hex() == public
    assert main(["key", "delegate", "--key", str(release), "--days", "2", "--out", str(server)]) == 0
    assert f"speaks for release key {public} for 2 days" in capsys.readouterr().out
    assert main(["bundle", "sign", str(bundle), "--key", str(release)]) == 0
    data = (bundle / MANIFEST).read_bytes()
    assert f"the bundle is now {bundle_digest(data)}" in capsys.readouterr().out
    assert bundle_digest(data) != unsigned
    check_manifest(data, "it", bytes.fromhex(public))
    assert [path.stat().st_mode & 0o777 for path in (release, server)] == [0o600, 0o600]
    known = ServerKey.read(server, now=0.0)
    assert known.release_key.hex() == public
    assert known.has_signed(data)


def test_a_key_is_never_replaced_and_another_file_is_no_key(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    key = tmp_path / "release.key"
    key.write_text("precious")
    for command in (
        ["key", "create", "--out", str(key)],
        ["key", "delegate", "--key", str(key), "--out", str(tmp_path / "x")],
        ["key", "delegate", "--key", str(tmp_path / "none"), "--out", str(tmp_path / "x")],
        ["bundle", "sign", str(tmp_path), "--key", str(key)],
    ):
        assert main(command) == 2
    said = capsys.readouterr().err
    assert "a new file: a key is never replaced" in said
    assert "a key that `fedtt key create` made" in said
    assert "a readable file (No such file or directory)" in said
    assert key.read_text() == "precious"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda text: "{}", "a file that `fedtt key delegate` wrote"),
        (lambda text: text.replace('"private_key": "', '"private_key": "0000')[:-1], "wrote"),
        (lambda text: text.replace("AAAA", "AAAB"), "damaged"),
        (lambda text: text.replace('"delegation": "', '"delegation": "AAAA'), "this one is damaged"),
    ],
)
def test_a_server_key_that_is_damaged_or_out_of_date_is_refused(
    tmp_path: Path, change: object, said: str
) -> None:
    release, server = tmp_path / "release.key", tmp_path / "server.key"
    main(["key", "create", "--out", str(release)])
    main(["key", "delegate", "--key", str(release), "--out", str(server)])
    assert callable(change)
    text = server.read_text()
    server.write_text(change(text))
    with pytest.raises(ConfigError, match=said):
        ServerKey.read(server, now=0.0)
    server.write_text(text)
    with pytest.raises(ConfigError, match="a key that has not expired: run `fedtt key delegate`"):
        ServerKey.read(server, now=1e11)
    server.chmod(0o644)
    with pytest.raises(ConfigError, match="chmod 600"):
        ServerKey.read(server, now=0.0)


@pytest.fixture(scope="module")
def signed(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, bytes]:
    """A signed manifest and the public key."""
    directory = tmp_path_factory.mktemp("signed")
    write_small_bundle(directory / "bundle", base_bytes=10)
    main(["key", "create", "--out", str(directory / "key")])
    main(["bundle", "sign", str(directory / "bundle"), "--key", str(directory / "key")])
    public = read_key(directory / "key").public_key().public_bytes_raw()
    return (directory / "bundle" / MANIFEST).read_bytes(), public


@given(at=st.integers(min_value=0), bit=st.integers(0, 7))
def test_any_bit_of_a_signed_manifest_that_flips_is_noticed(
    signed: tuple[bytes, bytes], at: int, bit: int
) -> None:
    data, public = signed
    place = at % len(data)
    flipped = data[:place] + bytes([data[place] ^ (1 << bit)]) + data[place + 1 :]
    with pytest.raises(BundleError, match="signed"):
        check_manifest(flipped, "it", public)


def test_what_a_signature_covers_is_the_manifest_with_null_in_its_place(signed: tuple[bytes, bytes]) -> None:
    data, public = signed
    covered, signature = manifest_claim(data)
    assert signature is not None
    assert covered == data.replace(b'"' + signature.hex().encode() + b'"', b"null")
    assert decode_manifest(data).signature == signature.hex()
    assert decode_manifest(covered).signature is None
    Ed25519PublicKey.from_public_bytes(public).verify(signature, covered)
    assert signed_manifest(covered, signature) == data == signed_manifest(data, signature)
    with pytest.raises(BundleError, match="not as `fedtt export` writes it"):
        signed_manifest(b"{}", signature)
