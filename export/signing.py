"""Release keys: made here, kept away from servers; they sign bundles and vouch for servers' keys."""

from __future__ import annotations

import os
import time
from pathlib import Path

import msgspec
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)

from fedtt.errors import BundleError, ConfigError, StorageError
from fedtt.manifest import MANIFEST, bundle_digest, decode_manifest
from fedtt.release import Delegation, ServerKeyFile, delegation_base, manifest_claim, signed_manifest

__all__ = ["create_key", "delegate", "read_key", "sign_bundle"]


def create_key(path: Path) -> str:
    """Make a release key in a file that only its owner reads; returns its public half in hex."""
    key = Ed25519PrivateKey.generate()
    _write_secret(path, key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    return key.public_key().public_bytes_raw().hex()


def read_key(path: Path) -> Ed25519PrivateKey:
    """Raises ConfigError where the file holds no such key."""
    try:
        key = load_pem_private_key(path.read_bytes(), password=None)
    except OSError as error:
        raise ConfigError("key", str(path), f"a readable file ({error.strerror})") from None
    except (ValueError, TypeError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, Ed25519PrivateKey):
        raise ConfigError("key", str(path), "a key that `fedtt key create` made")
    return key


def delegate(key: Ed25519PrivateKey, out: Path, days: int) -> Delegation:
    """Make a key for a server and vouch for it for some days; the file goes to the server."""
    if not 1 <= days <= 3650:
        raise ConfigError("--days", days, "a whole number from 1 to 3650")
    server, release = Ed25519PrivateKey.generate(), key.public_key().public_bytes_raw()
    public, expires = server.public_key().public_bytes_raw(), int(time.time()) + days * 86400
    signature = key.sign(delegation_base(release, public, expires))
    found = Delegation(release_key=release, server_key=public, expires=expires, signature=signature)
    file = ServerKeyFile(private_key=server.private_bytes_raw().hex(), delegation=found.header)
    _write_secret(out, msgspec.json.format(msgspec.json.encode(file), indent=2) + b"\n")
    return found


def sign_bundle(directory: Path, key: Ed25519PrivateKey) -> str:
    """Put the key's signature into a bundle's manifest; returns the bundle's new name."""
    path = directory / MANIFEST
    try:
        data = path.read_bytes()
        decode_manifest(data, str(path))
        covered, _ = manifest_claim(data)
        signed = signed_manifest(data, key.sign(covered))
        stage = path.with_name(MANIFEST + ".new")
        stage.write_bytes(signed)
        stage.replace(path)
    except OSError as error:
        raise BundleError(f"{path} cannot be signed: {error.strerror}; is it a bundle?") from None
    return bundle_digest(signed)


def _write_secret(path: Path, data: bytes) -> None:
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except FileExistsError:
        raise ConfigError("--out", str(path), "a new file: a key is never replaced") from None
    except OSError as error:
        raise StorageError(f"{path} cannot be written: {error.strerror}") from None
