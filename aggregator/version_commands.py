"""`fedtt version`: list, download, release, hold and bring back versions of the factors."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from aggregator.admin_command import admin_command, print_rows
from fedtt.cli import add_group, print_json

if TYPE_CHECKING:
    from aggregator.admin_client import AdminClient
    from fedtt.cli import Commands

__all__ = ["register"]

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


def register(commands: Commands) -> None:
    versions = add_group(
        commands,
        "version",
        about="list, download, release, hold and bring back versions of the factors",
        examples="fedtt version download assistant --out result",
    )
    listing = admin_command(
        versions,
        "list",
        about="list versions",
        examples="fedtt version list assistant",
        action=_list_versions,
    )
    listing.add_argument("task", help="name of the task")
    download = admin_command(
        versions,
        "download",
        about="download a version as safetensors, ready for `fedtt predict` and transformers",
        examples="""
            fedtt version download assistant --out result
            fedtt version download assistant --number 12 --out v12 --no-bundle
        """,
        action=_download_version,
    )
    download.add_argument("task", help="name of the task")
    download.add_argument("--number", type=int, help="which version (default the newest released one)")
    download.add_argument("--out", type=Path, required=True, help="directory to write")
    download.add_argument(
        "--no-bundle", action="store_true", help="leave out the bundle that `fedtt predict` runs"
    )

    for name, about in {
        "release": "let devices train from a version that waits for its verdict, or one held be brought back",
        "hold": "let no device train from a candidate: what stood before it follows under the next number",
        "rollback": "publish an earlier version again under the next number",
    }.items():
        steering = admin_command(
            versions, name, about=about, examples=f"fedtt version {name} assistant 12", action=_steer_version
        )
        steering.add_argument("task", help="name of the task")
        steering.add_argument("number", type=int, help="which version")
        steering.set_defaults(change=name)


async def _list_versions(client: AdminClient, args: argparse.Namespace) -> None:
    print_rows(await client.task(args.task, "/versions"), args, _VERSION_COLUMNS)


async def _steer_version(client: AdminClient, args: argparse.Namespace) -> None:
    below = f"/versions/{args.number}/{args.change}"
    print_rows([await client.task(args.task, below, "POST")], args, _VERSION_COLUMNS)


async def _download_version(client: AdminClient, args: argparse.Namespace) -> None:
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
