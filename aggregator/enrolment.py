"""The tokens that devices enrol with: made by people, or beside the database, and taken back."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta
from msgspec.structs import replace

from aggregator.answers import NewToken, RevokedToken
from aggregator.people import ACTOR, audited
from aggregator.problems import malformed, not_found
from aggregator.service import Service
from aggregator.token_files import new_token, secret_file, token_sha256
from fedtt.errors import StorageError
from fedtt.messages import Problem
from storage import audit
from storage.records import Token
from storage.store import Transaction

__all__ = ["TokenTerms", "create_token", "no_standing_token", "revoke_token", "standing_token"]


class TokenTerms(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What an enrolment token allows."""

    uses: Annotated[int, Meta(ge=1, le=10**9)] | None = None  #: enrolments; None for any number
    expires_s: Annotated[float, Meta(gt=0, le=10**9)] | None = None  #: from now on; None for never


async def create_token(service: Service, body: bytes) -> NewToken | Problem:
    """Make an enrolment token; it is in this answer and nowhere else, for the ledger keeps its hash."""
    try:
        terms = msgspec.json.decode(body, type=TokenTerms)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        return malformed(str(error))
    text = new_token()
    expires_at = None if terms.expires_s is None else service.clock.now() + terms.expires_s
    token = Token(sha256=token_sha256(text), uses_left=terms.uses, expires_at=expires_at)
    answer = await audited(
        service,
        "token.create",
        token.sha256,
        lambda tx: tx.put_token(token),
        uses=terms.uses,
        expires_at=expires_at,
    )
    if isinstance(answer, Problem):
        return answer
    return NewToken(token=text, sha256=token.sha256, uses=terms.uses, expires_at=expires_at)


async def revoke_token(service: Service, sha256: str) -> RevokedToken | Problem:
    """Let no device enrol with it any more; those that have stay."""

    def revoke(tx: Transaction) -> RevokedToken | Problem:
        token = tx.token(sha256)
        if token is None:
            return not_found(f"enrolment token {sha256[:12]}…")
        tx.put_token(replace(token, uses_left=0))
        return RevokedToken(sha256=sha256)

    return await audited(service, "token.revoke", sha256, revoke)


async def standing_token(service: Service, path: Path) -> str:
    """The token in a file, good for any number of devices; another in its place where it was revoked."""
    text = secret_file(path)
    token = Token(sha256=token_sha256(text), uses_left=None, expires_at=None)

    def stands(tx: Transaction) -> bool:
        known = tx.token(token.sha256)
        if known is None:
            tx.put_token(token)
            audit.append(tx, service.clock.now(), ACTOR.get(), "token.create", token.sha256, {"uses": None})
        return known is None or known.uses_left != 0

    if await service.writer.run(stands):
        return text
    _remove(path)
    return await standing_token(service, path)


async def no_standing_token(service: Service, path: Path) -> None:
    """Take the token in a file back, if a server before this one has made one."""
    if not path.exists():
        return
    sha256 = token_sha256(secret_file(path))

    def revoke(tx: Transaction) -> None:
        token = tx.token(sha256)
        if token is not None and token.uses_left != 0:
            tx.put_token(replace(token, uses_left=0))
            audit.append(tx, service.clock.now(), ACTOR.get(), "token.revoke", sha256, {})

    await service.writer.run(revoke)
    _remove(path)


def _remove(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise StorageError(f"{path} holds a revoked token and cannot be removed: {error.strerror}") from None
