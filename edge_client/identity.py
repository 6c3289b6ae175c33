"""The device's own Ed25519 key: made on the device, never sent; it signs every request."""

from __future__ import annotations

import stat

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)

from edge_client.files import storage_errors, write_atomically
from edge_client.home import Home
from fedtt.errors import StorageError
from fedtt.messages import device_id
from fedtt.signature import LASTS_S, Signed, content_digest, signature_base, signature_headers

__all__ = ["Identity"]


class Identity:
    """A private key and the name that follows from it."""

    def __init__(self, key: Ed25519PrivateKey) -> None:
        self._key = key
        self.public_key = key.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)  #: 32 bytes
        self.device = device_id(self.public_key)

    @classmethod
    def open(cls, home: Home) -> Identity:
        """The key of a home, made at its first use. Raises StorageError if damaged or readable by others."""
        if not home.key.exists():
            key = Ed25519PrivateKey.generate()
            write_atomically(home.key, key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
            return cls(key)
        with storage_errors(home.key):
            data, mode = home.key.read_bytes(), home.key.stat().st_mode
        if mode & (stat.S_IRWXG | stat.S_IRWXO):
            raise StorageError(f"{home.key} can be read by other users: chmod 600 it")
        try:
            found = load_pem_private_key(data, password=None)
        except (ValueError, TypeError, UnsupportedAlgorithm):
            found = None
        if not isinstance(found, Ed25519PrivateKey):
            raise StorageError(
                f"{home.key} is not an Ed25519 key in PEM: restore it, "
                f"or start anew with 'fedtt client forget --home {home.directory} --local-only'"
            )
        return cls(found)

    def sign(
        self,
        *,
        method: str,
        authority: str,
        path: str,
        body: bytes,
        created: int,
        nonce: int,
        digest: str = "",
    ) -> dict[str, str]:
        """The headers that sign one request (see `fedtt.signature`), good for as long as may be.

        digest: `content_digest` of the body, where it has been taken elsewhere.
        """
        signed = Signed(
            method=method,
            authority=authority,
            path=path,
            digest=digest or content_digest(body),
            created=created,
            expires=created + LASTS_S,
            nonce=nonce,
            device=self.device,
        )
        return signature_headers(signed, self._key.sign(signature_base(signed)))
