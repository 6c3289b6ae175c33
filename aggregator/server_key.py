"""The key with which a server signs its answers to check-ins, and the release key that vouches for it."""

from __future__ import annotations

from pathlib import Path

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from fedtt.errors import ConfigError, WireError
from fedtt.release import (
    Delegation,
    SignedAnswer,
    answer_base,
    answer_headers,
    delegation_base,
    manifest_claim,
    read_server_key,
    request_signature,
)
from fedtt.signature import content_digest

__all__ = ["ServerKey"]

_WHAT = "a file that `fedtt key delegate` wrote"


class ServerKey:
    """A private key whose delegation has been checked."""

    def __init__(self, key: Ed25519PrivateKey, delegation: Delegation) -> None:
        self._key, self.delegation = key, delegation

    @property
    def release_key(self) -> bytes:
        return self.delegation.release_key

    @classmethod
    def read(cls, path: Path, now: float) -> ServerKey:
        """Raises ConfigError where the file is another one, damaged, readable by others or out of date."""
        try:
            data, mode = path.read_bytes(), path.stat().st_mode
        except OSError as error:
            raise ConfigError("--server-key", str(path), f"a readable file ({error.strerror})") from None
        if mode & 0o077:
            raise ConfigError("--server-key", str(path), "a file that only its owner reads: chmod 600 it")
        file = read_server_key(data, str(path))
        key = Ed25519PrivateKey.from_private_bytes(bytes.fromhex(file.private_key))
        try:
            found = Delegation.parse(file.delegation)
            base = delegation_base(found.release_key, found.server_key, found.expires)
            Ed25519PublicKey.from_public_bytes(found.release_key).verify(found.signature, base)
        except (WireError, InvalidSignature):
            raise ConfigError("--server-key", str(path), f"{_WHAT}; this one is damaged") from None
        if found.server_key != key.public_key().public_bytes_raw():
            raise ConfigError("--server-key", str(path), f"{_WHAT}; this one vouches for another key")
        if found.expires <= now:
            raise ConfigError(
                "--server-key", str(path), "a key that has not expired: run `fedtt key delegate`"
            )
        return cls(key, found)

    def sign(self, status: int, body: bytes, request: str, now: float) -> dict[str, str]:
        """The headers that sign an answer to the request with this Signature header."""
        answer = SignedAnswer(
            status=status,
            digest=content_digest(body),
            request_signature=request_signature(request),
            created=int(now),
            server_key=self.delegation.server_key,
        )
        return answer_headers(answer, self._key.sign(answer_base(answer)), self.delegation)

    def has_signed(self, manifest: bytes) -> bool:
        """Whether the release key has signed this bundle."""
        covered, signature = manifest_claim(manifest)
        try:
            Ed25519PublicKey.from_public_bytes(self.release_key).verify(signature or b"", covered)
        except InvalidSignature:
            return False
        return True
