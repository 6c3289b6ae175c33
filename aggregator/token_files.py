"""Secrets a server makes, for itself at its first start and for people who ask, and how it knows them."""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import os
import secrets
import time
from pathlib import Path

from fedtt.errors import StorageError

__all__ = ["new_token", "same_token", "secret_file", "token_sha256"]

_LOOKS, _LOOK_AGAIN_S = 10, 0.02  #: whether whoever made a file has written it


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
        with contextlib.suppress(FileExistsError):  # another server that starts now may make it first
            handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(handle, "w") as file:
                file.write(new_token() + "\n")
        for _ in range(_LOOKS):
            if token := path.read_text().strip():
                return token
            time.sleep(_LOOK_AGAIN_S)
    except (OSError, UnicodeDecodeError) as error:
        raise StorageError(f"{path} cannot be read or made: {error}") from None
    raise StorageError(f"{path} is empty: delete it, and the next start makes a new token")
