"""The audit of a ledger: what became of every acknowledged update, from the files and the database alone.

Read with sqlite3 or plain SQL, hashlib and numpy and no code of the server's, so that it cannot share the
server's mistakes.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence, Set
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
from msgspec import Struct
from msgspec.structs import asdict
from numpy.typing import NDArray

from benchmarks.faults.devices import Notes
from benchmarks.faults.row import Figures
from benchmarks.faults.tables import SqliteTables, Tables

__all__ = ["NOTHING_WRONG", "Audit", "audit"]


class Audit(Struct, frozen=True, kw_only=True):
    """Counts; all but the first four must be zero."""

    acknowledged: int
    folded: int
    discarded: int
    versions: int
    lost: int  #: acknowledged, and not in the ledger with the bytes that were sent
    misheld: int  #: that wait without a payload, or that have ended and kept it
    unsettled: int  #: in no terminal state although the task has ended
    miscounted: int  #: versions that name another number of updates than point to them
    folded_otherwise: (
        int  #: places of versions whose factors hold a device more or less often than the ledger
    )
    unreasoned: int  #: discarded without a reason
    damaged: int  #: faults that the database itself finds, and blobs that do not match their names
    wrong_answers: int  #: that devices met

    def figures(self) -> Figures:
        return asdict(self)


#: Bounds of an audit's figures.
NOTHING_WRONG = {
    name: 0.0
    for name in Audit.__struct_fields__
    if name not in {"acknowledged", "folded", "discarded", "versions"}
}


class _Update(NamedTuple):
    """A row of the ledger."""

    sequence: int
    lease: str
    device: str
    digest: str
    state: str
    reason: str
    folded_into: int | None


class _Version(NamedTuple):
    """A row of the versions."""

    number: int
    sha256: str
    updates: int


_UPDATES = "SELECT sequence, lease_id, device_id, digest, state, reason, folded_into FROM updates"
_VERSIONS = "SELECT number, sha256, updates FROM versions WHERE branch = 'main' ORDER BY number"


def audit(
    data: Path,
    notes: Notes,
    places: Mapping[str, int],
    *,
    tables: Tables | None = None,
    ended: bool = True,
    wiped: bool = True,
) -> Audit:
    """Look at a server's directory, and its database, while no server runs on them.

    places: device -> its place among the factors (`benchmarks.faults.devices`).
    tables: where they lie; by default in the directory's own SQLite file.
    ended: whether the task was stopped, so that every update must be in a terminal state.
    wiped: whether the server was told to stop after that and met no fault, so that no payload is left.
    """
    tables = tables or SqliteTables(data / "fedtt.db")
    damaged = tables.damaged()
    updates = [_Update(*row) for row in tables.rows(_UPDATES)]
    versions = [_Version(*row) for row in tables.rows(_VERSIONS)]
    held = {sequence for (sequence,) in tables.rows("SELECT sequence FROM payloads")}
    states = Counter(update.state for update in updates)
    known = {update.lease: update.digest for update in updates}
    folded = [update for update in updates if update.state == "folded"]
    members = Counter(update.folded_into for update in folded)
    wrong_places, wrong_blobs = _compare_factors(data, versions, folded, places)
    return Audit(
        acknowledged=len(notes.acknowledged),
        folded=states["folded"],
        discarded=states["discarded"],
        versions=len(versions) - 1,
        lost=sum(known.get(lease) != digest for lease, digest in notes.acknowledged.items()),
        misheld=sum(_is_misheld(update, held, wiped=wiped) for update in updates),
        unsettled=states["accepted"] if ended else 0,
        miscounted=sum(members[version.number] != version.updates for version in versions),
        folded_otherwise=wrong_places,
        unreasoned=sum(update.state == "discarded" and not update.reason for update in updates),
        damaged=damaged + wrong_blobs,
        wrong_answers=len(notes.wrong),
    )


def _is_misheld(update: _Update, held: Set[int], *, wiped: bool) -> bool:
    if update.state == "accepted":
        return update.sequence not in held
    return wiped and update.sequence in held


def _compare_factors(
    data: Path, versions: Sequence[_Version], updates: Iterable[_Update], places: Mapping[str, int]
) -> tuple[int, int]:
    """Places at which a version's step, times its updates, is not the devices the ledger says; bad blobs.

    With equal weights θ_n - θ_{n-1} = Σ e_place(k) / K over the K updates folded into version n.
    """
    wrong_places = wrong_blobs = 0
    members: dict[int | None, list[int]] = {}
    for update in updates:
        members.setdefault(update.folded_into, []).append(places[update.device])
    for before, version in pairwise(versions):
        from_, to = _factors(data, before.sha256), _factors(data, version.sha256)
        if from_ is None or to is None:
            wrong_blobs += 1
        else:
            found = np.rint((to - from_) * version.updates)
            expected = np.bincount(members.get(version.number, []), minlength=len(found))
            wrong_places += int((found != expected).sum())
    return wrong_places, wrong_blobs


def _factors(data: Path, sha256: str) -> NDArray[np.float64] | None:
    path = data / "blobs" / sha256[:2] / sha256
    content = path.read_bytes() if path.is_file() else b""
    if hashlib.sha256(content).hexdigest() != sha256:
        return None
    return np.frombuffer(content, "<f4").astype(np.float64)
