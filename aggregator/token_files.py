"""Secrets a server makes, for itself at its first start and for people who ask, and how it knows them."""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
from pathlib import Path

from fedtt.errors import StorageError

__all__ = ["new_token", "same_token", "secret_file", "token_sha256"]


def new_token() -> str:
    """192 random bits in hex: no command line takes it for an option, as it may one that begins with "-"."""
    return secrets.token_hex(24)


def token_sha256(token: str) -> str:
    """Tokens are kept as hashes alone."""
    return hashlib.sha256(token.encode(errors="surrogateescape")).hexdigest()


def same_token(given: str, sha256: str) -> bool:
    return hmac.compare_digest(token_sha256(given), sha256)


def secret_file(path: Path) -> str:
    """The token in a file that only its owner reads; made where there is none."""
    try:
        if not path.exists():
            handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(handle, "w") as file:
                file.write(new_token() + "\n")
        token = path.read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise StorageError(f"{path} cannot be read or made: {error}") from None
    if not token:
        raise StorageError(f"{path} is empty: delete it, and the next start makes a new token")
    return token
