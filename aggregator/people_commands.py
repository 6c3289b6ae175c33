"""`fedtt admin-token`, `fedtt audit` and `fedtt device revoke`."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import msgspec

from aggregator.admin_commands import print_rows
from fedtt.cli import print_json
from fedtt.errors import FedttError

if TYPE_CHECKING:
    from aggregator.admin_client import AdminClient

__all__ = [
    "create_admin_token",
    "list_admin_tokens",
    "list_audit",
    "revoke_admin_token",
    "revoke_device",
    "verify_audit",
]

_TOKEN_COLUMNS = ("name", "role", "created_at", "expires_at", "revoked_at")
_AUDIT_COLUMNS = ("sequence", "at", "actor", "action", "subject", "detail")


async def create_admin_token(client: AdminClient, args: argparse.Namespace) -> None:
    """Print the token alone, so that a script can take it as it is."""
    terms = {"name": args.name, "role": args.role, "expires_s": args.expires_s}
    made = msgspec.json.decode(await client.call("POST", "/admin-tokens", msgspec.json.encode(terms)))
    print_json(made) if args.json else print(made["token"])


async def list_admin_tokens(client: AdminClient, args: argparse.Namespace) -> None:
    print_rows(await client.rows("/admin-tokens"), args, _TOKEN_COLUMNS)


async def revoke_admin_token(client: AdminClient, args: argparse.Namespace) -> None:
    path = f"/admin-tokens/{quote(args.name, safe='')}/revoke"
    print_rows([await client.rows(path, "POST")], args, _TOKEN_COLUMNS)


async def revoke_device(client: AdminClient, args: argparse.Namespace) -> None:
    path = f"/devices/{quote(args.device, safe='')}/revoke"
    print_rows([await client.rows(path, "POST")], args, ("id", "state", "revoked_at"))


async def _entries(client: AdminClient) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    while page := await client.rows(f"/audit?after={rows[-1]['sequence'] if rows else 0}"):
        rows += page
    return rows


async def list_audit(client: AdminClient, args: argparse.Namespace) -> None:
    print_rows(await _entries(client), args, _AUDIT_COLUMNS)


async def verify_audit(client: AdminClient, args: argparse.Namespace) -> None:
    """Check the chain here, not on the server."""
    from storage import audit
    from storage.records import Audit

    entries = msgspec.convert(await _entries(client), list[Audit])
    if why := audit.fault(entries, args.head):
        raise FedttError(f"the audit log does not hold: {why}")
    head = entries[-1].sha256 if entries else audit.GENESIS
    if args.json:
        print_json({"entries": len(entries), "head": head})
    else:
        print(f"{len(entries)} entries hold; keep the head for the next time: --head {head}")
