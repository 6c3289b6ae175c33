"""The server's sub-commands: from serve and task to doctor, migrate and openapi."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from aggregator import (
    device_commands,
    people_commands,
    serve_command,
    task_commands,
    version_commands,
)
from fedtt.cli import add_command, print_json

if TYPE_CHECKING:
    from fedtt.cli import Commands

__all__ = ["register"]


def register(commands: Commands) -> None:
    serve_command.register(commands)
    task_commands.register(commands)
    version_commands.register(commands)
    device_commands.register(commands)
    people_commands.register(commands)
    _register_doctor(commands)
    _register_migrate(commands)
    _register_openapi(commands)


def _register_doctor(commands: Commands) -> None:
    def run(args: argparse.Namespace) -> int:
        from aggregator.doctor import run

        return run(args)

    doctor = add_command(
        commands,
        "doctor",
        about="check a deployment on this machine, and say what to fix",
        examples="fedtt doctor --data /var/lib/fedtt",
        run=run,
    )
    serve_command.place_arguments(doctor)


def _register_migrate(commands: Commands) -> None:
    def run(args: argparse.Namespace) -> None:
        from aggregator.migrate_command import run

        run(args)

    migrate = add_command(
        commands,
        "migrate",
        about="take a ledger to this program's schema, or back to an older program's; back it up first",
        examples="fedtt migrate --data /var/lib/fedtt\nfedtt migrate --data /var/lib/fedtt --to 0008",
        run=run,
    )
    serve_command.ledger_arguments(migrate)
    migrate.add_argument("--to", metavar="REVISION", help="a schema's number (default: this program's own)")


def _register_openapi(commands: Commands) -> None:
    def run(_: argparse.Namespace) -> None:
        from aggregator.openapi import document

        print_json(document())

    add_command(
        commands,
        "openapi",
        about="print the OpenAPI document of both listeners",
        examples="fedtt openapi > openapi.json",
        run=run,
    )
