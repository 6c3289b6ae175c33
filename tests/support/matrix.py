"""A matrix of refusals: the calls of a device, and a check that a refused one has changed nothing."""

from __future__ import annotations

import hashlib
import sqlite3
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, closing, contextmanager
from functools import partial
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from msgspec import Struct

from aggregator.metrics import totals
from edge_client.identity import Identity
from fedtt.messages import Code, Enroll, Failure, FailureCode, Judged, Plan, Verdict, Work, encode
from fedtt.signature import Signed, content_digest, signature_base, signature_headers
from tests.support.postgresql import needs_postgresql
from tests.support.postgresql import server as postgresql
from tests.support.served import CHECK_IN, Answer, Peer, Served, frame_of, served, task_text

__all__ = [
    "CALLS",
    "DATABASES",
    "STRANGER",
    "VERDICT",
    "Call",
    "Place",
    "Rows",
    "on_database",
    "signed",
    "with_a_lease",
]

VERDICT = Verdict(examples=1, before=Judged(loss=1.0), after=Judged(loss=1.0))
STRANGER = Identity(Ed25519PrivateKey.from_private_bytes(b"\7" * 32))


Rows = Callable[[], list[str]]  #: every row of every table, in one order


def rows_of_sqlite(path: Path) -> list[str]:
    with closing(sqlite3.connect(path)) as connection:
        return list(connection.iterdump())


def rows_of_postgresql(url: str) -> list[str]:
    name = url.rpartition("/")[2]
    tables = postgresql().sql("SELECT tablename FROM pg_tables WHERE schemaname = 'public'", name)
    each = (f"SELECT '{table} ' || entry::text FROM {table} AS entry" for (table,) in tables)  # noqa: S608  # names of its own
    return [str(row) for (row,) in postgresql().sql(" UNION ALL ".join(each) + " ORDER BY 1", name)]


class Call(Struct, frozen=True):
    """One request before it is signed."""

    method: str
    path: str
    body: bytes = b""


class Place(Struct, frozen=True):
    """A server with a device that holds a lease, and the rows of its ledger."""

    server: Served
    peer: Peer
    work: Work
    rows: Rows

    @property
    def plan(self) -> Plan:
        return self.work.plan

    def calls(self) -> dict[str, Call]:
        lease, plan = f"/v1/leases/{self.work.lease}", self.work.plan
        token, key = self.server.token, self.peer.identity.public_key
        return {
            "enroll": Call("POST", "/v1/enroll", encode(Enroll(public_key=key, token=token, client="x"))),
            "check in": Call("POST", "/v1/check-in", encode(CHECK_IN)),
            "bundle": Call("GET", f"/v1/bundles/{plan.bundle}/manifest.json"),
            "version": Call("GET", f"/v1/versions/{plan.version}"),
            "upload": Call("PUT", f"{lease}/update", frame_of(plan)),
            "receipt": Call("GET", lease),
            "verdict": Call("POST", f"{lease}/verdict", encode(VERDICT)),
            "failure": Call("POST", f"{lease}/failure", encode(Failure(code=FailureCode.OTHER))),
            "leave": Call("POST", "/v1/device/leave"),
            "erase": Call("DELETE", "/v1/device"),
        }

    def snapshot(self) -> str:
        """A hash over every row of every table."""
        return hashlib.sha256("\n".join(self.rows()).encode()).hexdigest()

    def refusals(self) -> Counter[str]:
        """How many have been counted, by their codes."""
        return Counter(totals(self.server.service.metrics.refusals, "code"))

    @contextmanager
    def unchanged(self, code: Code | None) -> Iterator[None]:
        """Check that the ledger is as before when the block is left, and one refusal of this code counted."""
        before, counted = self.snapshot(), self.refusals()
        yield
        assert self.snapshot() == before
        assert self.refusals() - counted == Counter([code.value] if code else [])

    async def send(self, call: Call, headers: dict[str, str]) -> Answer:
        return await self.server.raw(call.method, call.path, call.body, headers)


DATABASES = ("sqlite", pytest.param("postgresql", marks=needs_postgresql))


@asynccontextmanager
async def on_database(directory: Path, database: str) -> AsyncIterator[tuple[Served, Rows]]:
    """A server with its ledger on one of DATABASES, and how to read all of it."""
    url = postgresql().new_database() if database == "postgresql" else None
    rows = partial(rows_of_sqlite, directory / "data" / "fedtt.db")
    async with served(directory, task_text(), database=url) as started:
        yield started, partial(rows_of_postgresql, url) if url else rows


@asynccontextmanager
async def with_a_lease(server: tuple[Served, Rows]) -> AsyncIterator[Place]:
    """A new device there that holds a lease."""
    started, rows = server
    async with started.device() as peer:
        work = await peer.work()
        await started.service.writer.maintain()  # what devices before this one have left behind
        yield Place(started, peer, work, rows)


CALLS = (
    "enroll",
    "check in",
    "bundle",
    "version",
    "upload",
    "receipt",
    "verdict",
    "failure",
    "leave",
    "erase",
)


def signed(
    place: Place, call: Call, *, by: Identity | None = None, authority: str = "", **changes: int
) -> dict[str, str]:
    """Sound headers, but for what is changed: `late_s` shifts all times, `lasts_s` sets the expiry."""
    now = int(place.server.service.clock.now()) + changes.get("late_s", 0)
    identity = by or place.peer.identity
    claim = Signed(
        method=call.method,
        authority=authority or place.server.url.removeprefix("http://"),
        path=call.path,
        digest=content_digest(call.body),
        created=now,
        expires=now + changes.get("lasts_s", 300),
        nonce=now * 10**6,
        device=identity.device,
    )
    return signature_headers(claim, identity._key.sign(signature_base(claim)))
