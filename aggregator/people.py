"""People who may ask the server for something: their tokens and roles, and the log of what they changed."""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from typing import Annotated, TypeVar

import msgspec
from msgspec import Meta
from msgspec.structs import replace

from aggregator.answers import AdminTokenRow, AuditRow, NewAdminToken, RevokedDevice, as_row
from aggregator.metrics import PEOPLE
from aggregator.problems import malformed, not_found, taken_name
from aggregator.service import Service
from aggregator.token_files import new_token, same_token, token_sha256
from fedtt.messages import Problem
from fedtt.names import WHOLE
from storage import audit
from storage.records import AdminToken, Role
from storage.store import Transaction

__all__ = [
    "ACTOR",
    "OWNER",
    "AdminTokenTerms",
    "actor_of",
    "audited",
    "create_admin_token",
    "list_admin_tokens",
    "list_audit",
    "may",
    "revoke_admin_token",
    "revoke_device",
]

T = TypeVar("T")
OWNER = "owner"  #: whoever holds the token that lies beside the database
ACTOR: ContextVar[str] = ContextVar("actor", default="program")  #: whose request is being answered
_RANKS = tuple(Role)
_AUDIT_PAGE = 1000


def may(role: Role, needed: Role) -> bool:
    """Whether a role includes what another one may do."""
    return _RANKS.index(role) >= _RANKS.index(needed)


async def actor_of(service: Service, token: str, owner_sha256: str) -> tuple[str, Role] | None:
    """Whose token it is and what that person may do; None where it is nobody's."""
    if same_token(token, owner_sha256):
        return OWNER, Role.ADMIN
    found = await service.read(lambda tx: tx.admin_token(token_sha256(token)))
    if found is None or found.revoked_at is not None:
        return None
    if found.expires_at is not None and found.expires_at < service.clock.now():
        return None
    return found.name, found.role


async def audited(
    service: Service, action: str, subject: str, change: Callable[[Transaction], T], **detail: object
) -> T | Problem:
    """Make a change and log it in the same transaction; a refused one is not logged, for nothing changed."""
    actor, now = ACTOR.get(), service.clock.now()

    def both(tx: Transaction) -> T:
        answer = change(tx)
        if not isinstance(answer, Problem):
            audit.append(tx, now, actor, action, subject, detail)
        return answer

    return await service.write(both, task=PEOPLE)


class AdminTokenTerms(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What an admin token is for."""

    name: Annotated[str, Meta(pattern=f"^[a-z0-9][a-z0-9._-]{{0,62}}{WHOLE}")]
    role: Role
    expires_s: Annotated[float, Meta(gt=0, le=10**9)] | None = None  #: from now on; None for never


_TERMS = msgspec.json.Decoder(AdminTokenTerms)


async def create_admin_token(service: Service, body: bytes) -> NewAdminToken | Problem:
    """Make a token; it is in this answer and nowhere else, for the ledger keeps its hash."""
    try:
        terms = _TERMS.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        return malformed(str(error))
    text, now = new_token(), service.clock.now()
    token = AdminToken(
        sha256=token_sha256(text),
        name=terms.name,
        role=terms.role,
        created_at=now,
        expires_at=None if terms.expires_s is None else now + terms.expires_s,
    )

    def create(tx: Transaction) -> Problem | None:
        if terms.name == OWNER or any(known.name == terms.name for known in tx.admin_tokens()):
            return taken_name(terms.name)
        tx.put_admin_token(token)
        return None

    answer = await audited(service, "admin-token.create", token.name, create, role=token.role)
    return answer if isinstance(answer, Problem) else as_row(NewAdminToken, token, token=text)


async def list_admin_tokens(service: Service) -> list[AdminTokenRow]:
    return [as_row(AdminTokenRow, token) for token in await service.read(lambda tx: tx.admin_tokens())]


async def revoke_admin_token(service: Service, name: str) -> AdminTokenRow | Problem:
    now = service.clock.now()

    def revoke(tx: Transaction) -> AdminTokenRow | Problem:
        for token in tx.admin_tokens():
            if token.name == name:
                gone = token if token.revoked_at is not None else replace(token, revoked_at=now)
                tx.put_admin_token(gone)
                return as_row(AdminTokenRow, gone)
        return not_found(f"admin token {name[:63]!r}")

    return await audited(service, "admin-token.revoke", name, revoke)


async def revoke_device(service: Service, device_id: str) -> RevokedDevice | Problem:
    """Take a device's key out for good."""
    now = service.clock.now()
    answer = await audited(
        service, "device.revoke", device_id, lambda tx: service.coordinator.revoke(tx, now, device_id)
    )
    return answer if isinstance(answer, Problem) else as_row(RevokedDevice, answer)


async def list_audit(service: Service, after: int) -> list[AuditRow]:
    """Entries behind one, oldest first."""
    entries = await service.read(lambda tx: tx.audits(after=after, limit=_AUDIT_PAGE))
    return [as_row(AuditRow, entry) for entry in entries]
