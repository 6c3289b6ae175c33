"""`fedtt task`: create and steer federated tasks."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from aggregator.admin_command import admin_command, print_rows
from fedtt.cli import add_group, print_json
from fedtt.errors import ConfigError

if TYPE_CHECKING:
    from aggregator.admin_client import AdminClient
    from fedtt.cli import Commands

__all__ = ["register"]

_TASK_COLUMNS = ("name", "state", "version", "of", "round", "updates_in_round", "loss", "reason")
_ROUND_COLUMNS = ("number", "branch", "version_number", "state", "opened_at", "closed_at", "reason")
_GROUP_COLUMNS = ("number", "devices", "frequency", "depth", "ended", "cohort", "round_s")


def register(commands: Commands) -> None:
    tasks = add_group(
        commands,
        "task",
        about="create and steer federated tasks",
        examples="""
            fedtt task create task.toml --bundle ./bundle
            fedtt task show assistant
        """,
    )
    create = admin_command(
        tasks,
        "create",
        about="open a task for devices",
        examples="fedtt task create task.toml --bundle ./bundle",
        action=_create_task,
    )
    create.add_argument("file", type=Path, help="task file (TOML; docs/task.md explains each setting)")
    create.add_argument("--bundle", type=Path, required=True, help="directory made by `fedtt export`")
    admin_command(tasks, "list", about="list tasks", examples="fedtt task list", action=_list_tasks)
    for name, about in {
        "show": "show one task, its settings and its last rounds",
        "pause": "give no new leases",
        "resume": "give leases again",
        "stop": "end a task for good",
    }.items():
        command = admin_command(
            tasks, name, about=about, examples=f"fedtt task {name} assistant", action=_steer_task
        )
        command.add_argument("name", help="name of the task")
        command.set_defaults(change=name)


async def _create_task(client: AdminClient, args: argparse.Namespace) -> None:
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


async def _list_tasks(client: AdminClient, args: argparse.Namespace) -> None:
    print_rows(await client.rows("/tasks"), args, _TASK_COLUMNS)


async def _steer_task(client: AdminClient, args: argparse.Namespace) -> None:
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
