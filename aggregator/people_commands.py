"""`fedtt admin-token` and `fedtt audit`: people's rights, and what they changed."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING
from urllib.parse import quote

import msgspec

from aggregator.admin_command import (
    admin_command,
    expires_argument,
    expires_s,
    pages,
    print_rows,
    print_token,
)
from fedtt.cli import add_group, print_json
from fedtt.errors import FedttError

if TYPE_CHECKING:
    from aggregator.admin_client import AdminClient
    from fedtt.cli import Commands

__all__ = ["register", "verify_audit"]

_TOKEN_COLUMNS = ("name", "role", "created_at", "expires_at", "revoked_at")
_AUDIT_COLUMNS = ("sequence", "at", "actor", "action", "subject", "detail")


def register(commands: Commands) -> None:
    examples = "fedtt admin-token create alice --role operator"
    tokens = add_group(commands, "admin-token", about="make and revoke people's tokens", examples=examples)
    create = admin_command(
        tokens,
        "create",
        about="make a token for a person; it is shown once",
        examples=examples,
        action=_create_admin_token,
    )
    create.add_argument("name", help="whose it is: stands in the audit log")
    create.add_argument(
        "--role", required=True, choices=("viewer", "operator", "admin"), help="what it allows"
    )
    expires_argument(create)
    admin_command(
        tokens,
        "list",
        about="list them, without the tokens",
        examples="fedtt admin-token list",
        action=_list_admin_tokens,
    )
    revoke = admin_command(
        tokens,
        "revoke",
        about="take one back",
        examples="fedtt admin-token revoke alice",
        action=_revoke_admin_token,
    )
    revoke.add_argument("name", help="whose it is")
    log = add_group(commands, "audit", about="what people changed", examples="fedtt audit verify")
    admin_command(log, "list", about="list all changes", examples="fedtt audit list", action=_list_audit)
    verify = admin_command(
        log,
        "verify",
        about="check that no entry was changed, dropped or inserted",
        examples="fedtt audit verify --head 5d08cdc7…",
        action=verify_audit,
    )
    verify.add_argument("--head", help="hash that an earlier run printed and must still be there")


async def _create_admin_token(client: AdminClient, args: argparse.Namespace) -> None:
    terms = {"name": args.name, "role": args.role, "expires_s": expires_s(args)}
    print_token(
        msgspec.json.decode(await client.call("POST", "/admin-tokens", msgspec.json.encode(terms))), args
    )


async def _list_admin_tokens(client: AdminClient, args: argparse.Namespace) -> None:
    print_rows(await client.rows("/admin-tokens"), args, _TOKEN_COLUMNS)


async def _revoke_admin_token(client: AdminClient, args: argparse.Namespace) -> None:
    path = f"/admin-tokens/{quote(args.name, safe='')}/revoke"
    print_rows([await client.rows(path, "POST")], args, _TOKEN_COLUMNS)


async def _list_audit(client: AdminClient, args: argparse.Namespace) -> None:
    print_rows(await pages(client, "/audit", "sequence"), args, _AUDIT_COLUMNS)


async def verify_audit(client: AdminClient, args: argparse.Namespace) -> None:
    """Check the chain here, not on the server."""
    from storage import audit
    from storage.records import Audit

    entries = msgspec.convert(await pages(client, "/audit", "sequence"), list[Audit])
    if why := audit.fault(entries, args.head):
        raise FedttError(f"the audit log does not hold: {why}")
    head = entries[-1].sha256 if entries else audit.GENESIS
    if args.json:
        print_json({"entries": len(entries), "head": head})
    else:
        print(f"{len(entries)} entries hold; keep the head for the next time: --head {head}")
