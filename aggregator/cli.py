"""The server's sub-commands: serve, task, version, device, token, admin-token, audit, doctor and openapi."""

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
