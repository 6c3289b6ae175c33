"""The device's own Ed25519 key: made on the device, never sent; it signs every request."""

from __future__ import annotations

import base64
import re
import stat

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from edge_client.files import storage_errors, write_atomically
from edge_client.home import Home
from fedtt.errors import StorageError
from fedtt.messages import device_id
from fedtt.signature import LASTS_S, Signed, content_digest, signature_base, signature_headers

__all__ = ["Identity"]

#: A key in PEM by RFC 8410, §7, written and read here: the library's own serialization draws in 23 modules,
#: of RSA, SSH and ciphers, which is a megabyte of a device.
_PKCS8 = bytes.fromhex("302e020100300506032b657004220420")  #: before the 32 bytes of the key
_PEM = re.compile(rb"-----BEGIN PRIVATE KEY-----\s+([A-Za-z0-9+/]{64})\s+-----END PRIVATE KEY-----\s*")


class Identity:
    """A private key and the name that follows from it."""

    def __init__(self, key: Ed25519PrivateKey) -> None:
        self._key = key
        self.public_key = key.public_key().public_bytes_raw()  #: 32 bytes
        self.device = device_id(self.public_key)

    @classmethod
    def open(cls, home: Home) -> Identity:
        """The key of a home, made at its first use. Raises StorageError if damaged or readable by others."""
        if not home.key.exists():
            key = Ed25519PrivateKey.generate()
            write_atomically(home.key, _pem(key))
            return cls(key)
        with storage_errors(home.key):
            data, mode = home.key.read_bytes(), home.key.stat().st_mode
        if mode & (stat.S_IRWXG | stat.S_IRWXO):
            raise StorageError(f"{home.key} can be read by other users: chmod 600 it")
        if (found := _key(data)) is None:
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


def _pem(key: Ed25519PrivateKey) -> bytes:
    text = base64.b64encode(_PKCS8 + key.private_bytes_raw())
    return b"-----BEGIN PRIVATE KEY-----\n" + text + b"\n-----END PRIVATE KEY-----\n"


def _key(pem: bytes) -> Ed25519PrivateKey | None:
    """None where it is no Ed25519 key."""
    found = _PEM.fullmatch(pem)
    data = base64.b64decode(found.group(1)) if found else b""
    return Ed25519PrivateKey.from_private_bytes(data[len(_PKCS8) :]) if data.startswith(_PKCS8) else None
