"""The audit of a ledger: what became of every acknowledged update, from the files alone.

Read with sqlite3 and hashlib and no code of the server's, so that it cannot share the server's mistakes.
"""

from __future__ import annotations

import hashlib
import sqlite3
from collections import Counter
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path

import numpy as np
from msgspec import Struct
from msgspec.structs import asdict
from numpy.typing import NDArray

from benchmarks.faults.devices import Notes
from benchmarks.faults.row import Figures

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


_MISHELD = (
    "SELECT count(*) FROM updates LEFT JOIN payloads USING (sequence) "
    "WHERE CASE state WHEN 'accepted' THEN payload IS NULL ELSE ? AND payload IS NOT NULL END"
)


def audit(
    data: Path, notes: Notes, places: Mapping[str, int], *, ended: bool = True, wiped: bool = True
) -> Audit:
    """Look at a server's directory while no server runs on it.

    places: device -> its place among the factors (`benchmarks.faults.devices`).
    ended: whether the task was stopped, so that every update must be in a terminal state.
    wiped: whether the server was told to stop after that and met no fault, so that no payload is left.
    """
    database = data / "fedtt.db"
    with closing(sqlite3.connect(f"file:{database}?mode=rw", uri=True)) as db:
        db.row_factory = sqlite3.Row
        checks = [row[0] for row in db.execute("PRAGMA integrity_check")]
        damaged = (checks != ["ok"]) + len(db.execute("PRAGMA foreign_key_check").fetchall())
        updates = {row["lease_id"]: row for row in db.execute("SELECT * FROM updates")}
        (misheld,) = db.execute(_MISHELD, (wiped,)).fetchone()
        versions = db.execute("SELECT * FROM versions WHERE branch = 'main' ORDER BY number").fetchall()
    states = Counter(row["state"] for row in updates.values())
    known = {lease: row["digest"] for lease, row in updates.items()}
    members = Counter(row["folded_into"] for row in updates.values() if row["state"] == "folded")
    wrong_places, wrong_blobs = _compare_factors(data, versions, updates, places)
    return Audit(
        acknowledged=len(notes.acknowledged),
        folded=states["folded"],
        discarded=states["discarded"],
        versions=len(versions) - 1,
        lost=sum(known.get(lease) != digest for lease, digest in notes.acknowledged.items()),
        misheld=misheld,
        unsettled=states["accepted"] if ended else 0,
        miscounted=sum(members[row["number"]] != row["updates"] for row in versions),
        folded_otherwise=wrong_places,
        unreasoned=sum(row["state"] == "discarded" and not row["reason"] for row in updates.values()),
        damaged=damaged + wrong_blobs,
        wrong_answers=len(notes.wrong),
    )


def _compare_factors(
    data: Path, versions: list[sqlite3.Row], updates: dict[str, sqlite3.Row], places: Mapping[str, int]
) -> tuple[int, int]:
    """Places at which a version's step, times its updates, is not the devices the ledger says; bad blobs.

    With equal weights θ_n - θ_{n-1} = Σ e_place(k) / K over the K updates of version n.
    """
    if len(versions) < 2:
        return 0, 0
    wrong_places = wrong_blobs = 0
    before = _factors(data, versions[0]["sha256"])
    folded: dict[int, list[int]] = {}
    for row in updates.values():
        if row["state"] == "folded":
            folded.setdefault(row["folded_into"], []).append(places[row["device_id"]])
    for version in versions[1:]:
        after = _factors(data, version["sha256"])
        if after is None or before is None:
            wrong_blobs += 1
        else:
            found = np.rint((after - before) * version["updates"])
            expected = np.bincount(folded.get(version["number"], []), minlength=len(found))
            wrong_places += int((found != expected).sum())
        before = after
    return wrong_places, wrong_blobs


def _factors(data: Path, sha256: str) -> NDArray[np.float64] | None:
    path = data / "blobs" / sha256[:2] / sha256
    content = path.read_bytes() if path.is_file() else b""
    if hashlib.sha256(content).hexdigest() != sha256:
        return None
    return np.frombuffer(content, "<f4").astype(np.float64)
