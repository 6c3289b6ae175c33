"""`fedtt device` and `fedtt token`: the population, and what it enrols with."""

from __future__ import annotations

import argparse
import re
from typing import TYPE_CHECKING
from urllib.parse import quote

from aggregator.admin_command import (
    admin_command,
    expires_argument,
    expires_s,
    pages,
    print_rows,
    print_token,
)
from fedtt.cli import add_group
from fedtt.errors import ConfigError

if TYPE_CHECKING:
    from aggregator.admin_client import AdminClient
    from fedtt.cli import Commands

__all__ = ["register"]

_SHA256 = re.compile("[0-9a-f]{64}")
_DEVICE_COLUMNS = ("id", "state", "client", "examples", "enrolled_at", "seen_at")


def register(commands: Commands) -> None:
    devices = add_group(
        commands, "device", about="look at the population", examples="fedtt device list --json"
    )
    admin_command(
        devices, "list", about="list enrolled devices", examples="fedtt device list", action=_list_devices
    )
    revoke = admin_command(
        devices,
        "revoke",
        about="take a device's key out for good",
        examples="fedtt device revoke 56475aa75463474c0285df5dbf2bcab7",
        action=_revoke_device,
    )
    revoke.add_argument("device", help="its id, as `fedtt device list` shows it")
    examples = "fedtt token create --uses 20 --expires-s 604800"
    tokens = add_group(
        commands, "token", about="make and revoke tokens that devices enrol with", examples=examples
    )
    create = admin_command(
        tokens,
        "create",
        about="make an enrolment token; it is shown once",
        examples=examples,
        action=_create_token,
    )
    create.add_argument("--uses", type=int, help="devices it enrols (default any number)")
    expires_argument(create)
    revoke_token = admin_command(
        tokens,
        "revoke",
        about="let no device enrol with a token any more; those that have stay",
        examples="fedtt token revoke 5d08cdc7…",
        action=_revoke_token,
    )
    revoke_token.add_argument("token", help="the token, or its sha256 as `fedtt audit list` shows it")


async def _list_devices(client: AdminClient, args: argparse.Namespace) -> None:
    print_rows(await pages(client, "/devices", "id"), args, _DEVICE_COLUMNS)


async def _revoke_device(client: AdminClient, args: argparse.Namespace) -> None:
    path = f"/devices/{quote(args.device, safe='')}/revoke"
    print_rows([await client.rows(path, "POST")], args, ("id", "state", "revoked_at"))


async def _create_token(client: AdminClient, args: argparse.Namespace) -> None:
    if args.uses is not None and args.uses < 1:
        raise ConfigError("--uses", args.uses, "a number from 1 on")
    print_token(await client.create_token(args.uses, expires_s(args)), args)


async def _revoke_token(client: AdminClient, args: argparse.Namespace) -> None:
    from aggregator.token_files import token_sha256

    sha256 = args.token if _SHA256.fullmatch(args.token) else token_sha256(args.token)
    print_rows([await client.rows(f"/tokens/{sha256}/revoke", "POST")], args, ("sha256",))
