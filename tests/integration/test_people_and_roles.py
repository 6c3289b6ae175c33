"""Who may do what on the admin listener, and the log of what was done."""

from __future__ import annotations

import argparse
import sqlite3
from collections.abc import AsyncIterator
from contextlib import closing
from pathlib import Path

import msgspec
import pytest
from aiohttp import web

from aggregator.admin_client import AdminClient
from aggregator.admin_routes import add_admin_routes
from aggregator.people_commands import verify_audit
from fedtt.errors import FedttError, Refused
from fedtt.messages import Code
from storage.records import Role
from tests.support.served import Answer, Served, refused, served, task_text


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[Served]:
    async with served(tmp_path, task_text()) as started:
        yield started


async def token(server: Served, name: str, role: Role, **terms: float) -> dict[str, str]:
    """The header of a person with this role."""
    body = msgspec.json.encode({"name": name, "role": role.value} | terms)
    answer = await server.people("POST", "/admin-tokens", body)
    assert answer.status == 201, answer.body
    return {"Authorization": f"Bearer {msgspec.json.decode(answer.body)['token']}"}


#: Every call that changes something, with the least role that may; a body that is refused only afterwards.
CALLS = {
    ("PUT", "/blobs/{sha256}"): Role.OPERATOR,
    ("POST", "/bundles"): Role.OPERATOR,
    ("POST", "/tasks"): Role.OPERATOR,
    ("POST", "/tasks/{task}/{change}"): Role.OPERATOR,
    ("POST", "/tasks/{task}/versions/{number}/{change}"): Role.OPERATOR,
    ("POST", "/tasks/{task}/versions/{number}/verdict"): Role.OPERATOR,
    ("POST", "/tokens"): Role.OPERATOR,
    ("POST", "/tokens/{sha256}/revoke"): Role.OPERATOR,
    ("POST", "/admin-tokens"): Role.ADMIN,
    ("POST", "/admin-tokens/{name}/revoke"): Role.ADMIN,
    ("POST", "/devices/{device}/revoke"): Role.ADMIN,
}
FILLED = {"sha256": "0" * 64, "task": "none", "number": "9", "name": "nobody", "device": "0" * 32}


def path_of(template: str) -> str:
    change = "hold" if "versions" in template else "pause"
    return template.format(**FILLED, change=change)


def test_every_call_that_changes_something_is_in_the_table() -> None:
    app = web.Application()
    add_admin_routes(app)
    found = {
        (route.method, route.resource.canonical.removeprefix("/v1/admin"))
        for route in app.router.routes()
        if route.resource and route.method not in {"GET", "HEAD"}
    }
    assert found == set(CALLS)


@pytest.mark.parametrize("role", Role)
async def test_a_role_may_do_what_it_may_and_no_more(server: Served, role: Role) -> None:
    person = await token(server, "someone", role)
    for path in ("/tasks", "/devices", "/audit", "/admin-tokens", "/population"):
        assert (await server.people("GET", path, None, person)).status == 200
    for (method, template), needed in CALLS.items():
        answer = await server.people(method, path_of(template), b"?", person)
        if list(Role).index(role) < list(Role).index(needed):
            refused(answer, Code.FORBIDDEN, f"'someone' is a {role.value}, this takes a {needed.value}")
        else:
            assert answer.status in {400, 404}, (template, answer.body)  # it got as far as the call itself


async def test_a_token_that_was_revoked_or_has_expired_is_worth_nothing(server: Served) -> None:
    gone, short = (
        await token(server, "gone", Role.ADMIN),
        await token(server, "short", Role.VIEWER, expires_s=1e-6),
    )
    assert (await server.people("POST", "/admin-tokens/gone/revoke", None, gone)).status == 200
    for person in (gone, short, {"Authorization": "Bearer guessed"}, {"Authorization": "Basic x"}):
        refused(await server.people("GET", "/tasks", None, person), Code.FORBIDDEN, "missing or wrong")
    again = msgspec.json.encode({"name": "gone", "role": "admin"})
    refused(await server.people("POST", "/admin-tokens", again), Code.CONFLICT, "exists or has existed")


async def test_tokens_lie_in_the_ledger_as_hashes(server: Served, tmp_path: Path) -> None:
    secret = (await token(server, "alice", Role.VIEWER))["Authorization"].split()[1].encode()
    await server.service.tick()
    assert not any(secret in file.read_bytes() for file in (tmp_path / "data").glob("fedtt.db*"))
    listed = (await server.people("GET", "/admin-tokens")).body
    assert b"alice" in listed
    assert b"sha256" not in listed


async def test_each_change_is_logged_with_who_made_it_and_refusals_are_not(server: Served) -> None:
    alice = await token(server, "alice", Role.OPERATOR)
    await server.people("POST", "/tasks/lights/pause", None, alice)
    await server.people("POST", "/tasks/none/pause", None, alice)
    await server.people("POST", "/admin-tokens", b"{}", alice)
    await server.people("POST", "/admin-tokens/alice/revoke")
    await server.people("POST", "/admin-tokens/nobody/revoke")
    async with server.device() as peer:
        await server.people("POST", f"/devices/{peer.identity.device}/revoke")
        with pytest.raises(Refused, match="revoked: an operator has revoked this device's key"):
            await peer.work()
        with pytest.raises(Refused, match="revoked"):
            await peer.enroll(server.token)
    rows = msgspec.json.decode((await server.people("GET", "/audit")).body)
    blobs = [row for row in rows if row["action"] == "blob.add"]
    assert len({row["subject"] for row in blobs}) == len(blobs) > 0
    assert all(msgspec.json.decode(row["detail"])["bytes"] > 0 and row["actor"] == "owner" for row in blobs)
    rows = [row for row in rows if row not in blobs]
    assert [(row["actor"], row["action"]) for row in rows] == [
        ("program", "token.create"),  # the one beside the database
        ("owner", "bundle.add"),
        ("owner", "task.create"),
        ("owner", "admin-token.create"),
        ("alice", "task.change"),
        ("owner", "admin-token.revoke"),
        ("owner", "device.revoke"),
    ]
    assert rows[5]["subject"] == "alice"
    assert rows[4]["subject"] == "lights"
    assert msgspec.json.decode(rows[4]["detail"]) == {"state": "paused"}
    last = 7 + len(blobs)
    later: Answer = await server.people("GET", f"/audit?after={last - 2}")
    assert [row["sequence"] for row in msgspec.json.decode(later.body)] == [last - 1, last]


async def test_the_log_verifies_from_outside_until_someone_tampers_with_it(
    server: Served, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    async with AdminClient(server.listening.admin_url, server.listening.admin_token) as client:
        await verify_audit(client, argparse.Namespace(head=None, json=True))
        head = msgspec.json.decode(capsys.readouterr().out)["head"]
        await token(server, "alice", Role.VIEWER)
        await verify_audit(client, argparse.Namespace(head=head, json=False))
        entries = len(msgspec.json.decode((await server.people("GET", "/audit")).body))
        assert f"{entries} entries hold; keep the head for the next time: --head " in capsys.readouterr().out
        with closing(sqlite3.connect(tmp_path / "data" / "fedtt.db", isolation_level=None)) as connection:
            connection.execute("DROP TRIGGER audit_no_update")
            connection.execute("UPDATE audit SET actor = 'mallory' WHERE sequence = 2")
        with pytest.raises(FedttError, match="does not hold: entry 2 was changed after it was written"):
            await verify_audit(client, argparse.Namespace(head=head, json=False))
