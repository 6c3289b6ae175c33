"""What the admin commands do and print."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from fedtt.cli import print_json
from fedtt.errors import ConfigError

if TYPE_CHECKING:
    from aggregator.admin_client import AdminClient

__all__ = [
    "create_task",
    "create_token",
    "download_version",
    "list_devices",
    "list_tasks",
    "list_versions",
    "print_rows",
    "steer_task",
    "steer_version",
]

_TASK_COLUMNS = ("name", "state", "version", "of", "round", "updates_in_round", "loss", "reason")
_ROUND_COLUMNS = ("number", "branch", "version_number", "state", "opened_at", "closed_at", "reason")
_VERSION_COLUMNS = (
    "number",
    "branch",
    "state",
    "updates",
    "examples",
    "loss_first",
    "loss_last",
    "sha256",
    "created_at",
    "reason",
)
_GROUP_COLUMNS = ("number", "devices", "frequency", "depth", "ended", "cohort", "round_s")
_DEVICE_COLUMNS = ("id", "state", "client", "examples", "enrolled_at", "seen_at")


async def create_task(client: AdminClient, args: argparse.Namespace) -> None:
    from aggregator.progress import upload_progress
    from fedtt.task import parse_task

    try:
        text = args.file.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError("file", str(args.file), f"a readable task file ({error})") from None
    parse_task(text, str(args.file))  # refuse nonsense before a large bundle is sent
    with upload_progress(quiet=args.json) as progress:
        bundle = await client.send_bundle(args.bundle, progress)
    print_rows([await client.create_task(text, bundle)], args, _TASK_COLUMNS)


async def list_tasks(client: AdminClient, args: argparse.Namespace) -> None:
    print_rows(await client.rows("/tasks"), args, _TASK_COLUMNS)


async def steer_task(client: AdminClient, args: argparse.Namespace) -> None:
    if args.change != "show":
        print_rows([await client.task(args.name, f"/{args.change}", "POST")], args, _TASK_COLUMNS)
        return
    task = await client.task(args.name)
    rounds = await client.task(args.name, "/rounds")
    if args.json:
        print_json(task | {"rounds": rounds})
        return
    from aggregator.progress import settings

    print_rows([task], args, _TASK_COLUMNS)
    settings(task["spec"])
    if task["groups"]:
        print_rows(task["groups"], args, _GROUP_COLUMNS)
    print_rows(rounds[:10], args, _ROUND_COLUMNS)


async def list_versions(client: AdminClient, args: argparse.Namespace) -> None:
    print_rows(await client.task(args.task, "/versions"), args, _VERSION_COLUMNS)


async def steer_version(client: AdminClient, args: argparse.Namespace) -> None:
    below = f"/versions/{args.number}/{args.change}"
    print_rows([await client.task(args.task, below, "POST")], args, _VERSION_COLUMNS)


async def download_version(client: AdminClient, args: argparse.Namespace) -> None:
    number = args.number
    if number is None:
        number = await _newest_released(client, args.task)
    await client.download_version(args.task, number, args.out)
    if not args.no_bundle:
        bundle = (await client.task(args.task))["bundle"]
        await client.download_bundle(bundle, args.out / "bundle")
    if args.json:
        print_json({"task": args.task, "version": number, "path": str(args.out)})
    else:
        print(f"version {number} of {args.task} is in {args.out}")


async def _newest_released(client: AdminClient, task: str) -> int:
    """The newest version that was not held and waits for no verdict; number 0 always is one."""
    versions = await client.task(task, "/versions")
    return max(int(version["number"]) for version in versions if version["state"] == "released")


async def create_token(client: AdminClient, args: argparse.Namespace) -> None:
    """Print the token alone, so that a script can take it as it is."""
    if args.uses is not None and args.uses < 1:
        raise ConfigError("--uses", args.uses, "a number from 1 on")
    if args.expires_s is not None and not 0 < args.expires_s <= 10**9:
        raise ConfigError("--expires-s", args.expires_s, "seconds above 0, at most 1e9")
    made = await client.create_token(args.uses, args.expires_s)
    if args.json:
        print_json(made)
    else:
        print(made["token"])


async def list_devices(client: AdminClient, args: argparse.Namespace) -> None:
    rows: list[dict[str, Any]] = []
    while page := await client.rows(f"/devices?after={rows[-1]['id'] if rows else ''}"):
        rows += page
    print_rows(rows, args, _DEVICE_COLUMNS)


def print_rows(rows: list[dict[str, Any]], args: argparse.Namespace, columns: tuple[str, ...]) -> None:
    """JSON, one object a line; or a table for people."""
    if args.json:
        for row in rows:
            print_json(row)
        return
    from aggregator.progress import table

    table(rows, columns)
