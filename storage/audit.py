"""The audit log: each change a person made, chained to the one before it by a hash.

Who changes, drops or inserts an entry has to change the hashes of all entries after it, and so the last one:
whoever has kept that (`fedtt audit verify` prints it, the server logs each) will notice.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator

import msgspec
from msgspec.structs import asdict, replace

from storage.records import Audit
from storage.store import Transaction

__all__ = ["GENESIS", "append", "digest", "entries", "fault"]

GENESIS = "0" * 64  #: what the first entry has before it
_PAGE = 500


def append(
    tx: Transaction, now: float, actor: str, action: str, subject: str, detail: dict[str, object]
) -> Audit:
    """Add an entry in the very transaction whose change it tells of."""
    last = tx.last_audit()
    entry = Audit(
        sequence=last.sequence + 1 if last else 1,
        at=now,
        actor=actor,
        action=action,
        subject=subject[:100],
        detail=msgspec.json.encode(detail).decode(),
        previous=last.sha256 if last else GENESIS,
        sha256="",
    )
    entry = replace(entry, sha256=digest(entry))
    tx.add_audit(entry)
    return entry


def digest(entry: Audit) -> str:
    """sha256 of the JSON list of all fields but the last, in their order."""
    *fields, _ = asdict(entry).values()
    return hashlib.sha256(msgspec.json.encode(fields)).hexdigest()


def entries(tx: Transaction) -> Iterator[Audit]:
    """All of them, oldest first."""
    after = 0
    while page := tx.audits(after=after, limit=_PAGE):
        yield from page
        after = page[-1].sequence


def fault(log: Iterable[Audit], head: str | None = None) -> str | None:
    """What is wrong with the chain, or None. head: the hash of an entry that must be in it."""
    previous, found = GENESIS, head in {None, GENESIS}
    for number, entry in enumerate(log, 1):
        if entry.sequence != number:
            return f"entry {number} is missing"
        if entry.previous != previous:
            return f"entry {number} does not follow entry {number - 1}"
        if digest(entry) != entry.sha256:
            return f"entry {number} was changed after it was written"
        previous, found = entry.sha256, found or entry.sha256 == head
    return None if found else f"no entry has the hash {head}: entries were cut off or rewritten"
