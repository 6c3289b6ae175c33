"""The server's sub-commands: serve, task, version, device, token, admin-token, audit, doctor and openapi."""

from __future__ import annotations

import argparse
import asyncio
import os
import socket
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aggregator.admin_commands import (
    create_task,
    create_token,
    download_version,
    list_devices,
    list_tasks,
    list_versions,
    steer_task,
    steer_version,
)
from aggregator.people_commands import (
    create_admin_token,
    list_admin_tokens,
    list_audit,
    revoke_admin_token,
    revoke_device,
    verify_audit,
)
from fedtt.cli import add_command, add_group, print_json
from fedtt.errors import ConfigError

if TYPE_CHECKING:
    from aggregator.admin_client import AdminClient
    from aggregator.app import Listening
    from fedtt.cli import Commands

__all__ = ["admin_command", "reachable", "register"]

_SWITCH_S = 0.0005  #: at most, that the writer waits for requests at work after each statement
Action = Callable[["AdminClient", argparse.Namespace], Awaitable[None]]


def register(commands: Commands) -> None:
    _register_serve(commands)
    _register_tasks(commands)
    _register_versions(commands)
    devices = add_group(
        commands, "device", about="look at the population", examples="fedtt device list --json"
    )
    admin_command(
        devices, "list", about="list enrolled devices", examples="fedtt device list", action=list_devices
    )
    revoke = admin_command(
        devices,
        "revoke",
        about="take a device's key out for good",
        examples="fedtt device revoke 56475aa75463474c0285df5dbf2bcab7",
        action=revoke_device,
    )
    revoke.add_argument("device", help="its id, as `fedtt device list` shows it")
    _register_tokens(commands)
    _register_people(commands)
    _register_doctor(commands)
    _register_openapi(commands)


def _register_serve(commands: Commands) -> None:
    serve = add_command(
        commands,
        "serve",
        about="run the aggregator",
        examples="""
            fedtt serve
            fedtt serve --data /var/lib/fedtt --host 0.0.0.0 --port 8440
        """,
        run=_serve,
    )
    serve.add_argument(
        "--data",
        type=Path,
        default=Path("fedtt-server"),
        help="directory of the database, blobs and tokens (default %(default)s)",
    )
    serve.add_argument("--host", default="127.0.0.1", help="address devices connect to (default %(default)s)")
    serve.add_argument("--port", type=_port, default=8440, help="0 picks a free one (default %(default)s)")
    serve.add_argument(
        "--admin-host", default="127.0.0.1", help="address people connect to (default %(default)s)"
    )
    serve.add_argument(
        "--admin-port", type=_port, default=8441, help="0 picks a free one (default %(default)s)"
    )
    serve.add_argument(
        "--reuse-port",
        action="store_true",
        help="share the devices' port with other servers on one PostgreSQL",
    )
    serve.add_argument("--log-json", action="store_true", help="write the log as JSON, an object a line")
    serve.add_argument(
        "--drain-s",
        type=float,
        default=0.0,
        help="seconds to go on serving after SIGTERM while /readyz says no (default %(default)s)",
    )
    serve.add_argument(
        "--behind-proxy",
        action="store_true",
        help="believe X-Forwarded-For, so that rates are counted by the addresses that a proxy saw",
    )
    serve.add_argument(
        "--tls-cert",
        type=Path,
        help="certificate chain in PEM, for both listeners (default: no TLS, or a proxy's)",
    )
    serve.add_argument("--tls-key", type=Path, help="its key in PEM, without a password")
    serve.add_argument(
        "--server-key",
        type=Path,
        help="file made by `fedtt key delegate`: devices that trust its release key follow this server",
    )
    serve.add_argument(
        "--blobs",
        default=os.environ.get("FEDTT_BLOBS"),
        help="where bundles and versions lie: a directory, or s3://BUCKET/PREFIX "
        "(default $FEDTT_BLOBS or blobs in the data directory)",
    )
    serve.add_argument(
        "--database",
        default=os.environ.get("FEDTT_DATABASE"),
        help="where the ledger lies, as postgresql+psycopg://USER@HOST/NAME "
        "(default $FEDTT_DATABASE or SQLite in the data directory)",
    )


def _register_tasks(commands: Commands) -> None:
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
        action=create_task,
    )
    create.add_argument("file", type=Path, help="task file (TOML; docs/task.md explains each setting)")
    create.add_argument("--bundle", type=Path, required=True, help="directory made by `fedtt export`")
    admin_command(tasks, "list", about="list tasks", examples="fedtt task list", action=list_tasks)
    for name, about in {
        "show": "show one task, its settings and its last rounds",
        "pause": "give no new leases",
        "resume": "give leases again",
        "stop": "end a task for good",
    }.items():
        command = admin_command(
            tasks, name, about=about, examples=f"fedtt task {name} assistant", action=steer_task
        )
        command.add_argument("name", help="name of the task")
        command.set_defaults(change=name)


def _register_versions(commands: Commands) -> None:
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
        action=list_versions,
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
        action=download_version,
    )
    download.add_argument("task", help="name of the task")
    download.add_argument("--number", type=int, help="which version (default the newest released one)")
    download.add_argument("--out", type=Path, required=True, help="directory to write")
    download.add_argument(
        "--no-bundle", action="store_true", help="leave out the bundle that `fedtt predict` runs"
    )

    for name, about in {
        "release": "let devices train from a version that waits for its verdict",
        "hold": "let no device train from it: what stood before it follows under the next number",
        "rollback": "publish an earlier version again under the next number",
    }.items():
        steering = admin_command(
            versions, name, about=about, examples=f"fedtt version {name} assistant 12", action=steer_version
        )
        steering.add_argument("task", help="name of the task")
        steering.add_argument("number", type=int, help="which version")
        steering.set_defaults(change=name)


def _register_tokens(commands: Commands) -> None:
    examples = "fedtt token create --uses 20 --expires-s 604800"
    tokens = add_group(commands, "token", about="make tokens that devices enrol with", examples=examples)
    create = admin_command(
        tokens,
        "create",
        about="make an enrolment token; it is shown once",
        examples=examples,
        action=create_token,
    )
    create.add_argument("--uses", type=int, help="devices it enrols (default any number)")
    create.add_argument("--expires-s", type=float, help="seconds for which it is good (default for ever)")


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
    doctor.add_argument(
        "--data",
        type=Path,
        default=Path("fedtt-server"),
        help="the server's directory (default %(default)s)",
    )
    for option, about in {
        "--tls-cert": "its certificate chain",
        "--tls-key": "the chain's key",
        "--server-key": "its key by `fedtt key delegate`",
    }.items():
        doctor.add_argument(option, type=Path, help=about)
    doctor.add_argument(
        "--database",
        default=os.environ.get("FEDTT_DATABASE"),
        help="SQLAlchemy URL (default $FEDTT_DATABASE, or SQLite in the data directory)",
    )


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


def _register_people(commands: Commands) -> None:
    examples = "fedtt admin-token create alice --role operator"
    tokens = add_group(commands, "admin-token", about="make and revoke people's tokens", examples=examples)
    create = admin_command(
        tokens,
        "create",
        about="make a token for a person; it is shown once",
        examples=examples,
        action=create_admin_token,
    )
    create.add_argument("name", help="whose it is: stands in the audit log")
    create.add_argument(
        "--role", required=True, choices=("viewer", "operator", "admin"), help="what it allows"
    )
    create.add_argument("--expires-s", type=float, help="seconds for which it is good (default for ever)")
    admin_command(
        tokens,
        "list",
        about="list them, without the tokens",
        examples="fedtt admin-token list",
        action=list_admin_tokens,
    )
    revoke = admin_command(
        tokens,
        "revoke",
        about="take one back",
        examples="fedtt admin-token revoke alice",
        action=revoke_admin_token,
    )
    revoke.add_argument("name", help="whose it is")
    log = add_group(commands, "audit", about="what people changed", examples="fedtt audit verify")
    admin_command(log, "list", about="list all changes", examples="fedtt audit list", action=list_audit)
    verify = admin_command(
        log,
        "verify",
        about="check that no entry was changed, dropped or inserted",
        examples="fedtt audit verify --head 5d08cdc7…",
        action=verify_audit,
    )
    verify.add_argument("--head", help="hash that an earlier run printed and must still be there")


def admin_command(
    group: Commands, name: str, *, about: str, examples: str, action: Action
) -> argparse.ArgumentParser:
    parser = add_command(group, name, about=about, examples=examples, run=lambda args: _run(action, args))
    parser.add_argument(
        "--server",
        default=os.environ.get("FEDTT_ADMIN_URL", "http://127.0.0.1:8441"),
        help="admin address of the server (default $FEDTT_ADMIN_URL or %(default)s)",
    )
    parser.add_argument(
        "--ca", type=Path, metavar="FILE", help="trust the certificates in it (default: this machine's)"
    )
    parser.add_argument(
        "--token-file",
        type=Path,
        default=Path("fedtt-server/admin-token"),
        help="file with the admin token, unless $FEDTT_ADMIN_TOKEN is set (default %(default)s)",
    )
    return parser


def _port(text: str) -> int:
    if not (text.isascii() and text.isdigit() and int(text) <= 65535):
        raise argparse.ArgumentTypeError(f"{text!r} is no port: give a number from 0 to 65535")
    return int(text)


def _run(action: Action, args: argparse.Namespace) -> None:
    from aggregator.admin_client import AdminClient

    async def main() -> None:
        async with AdminClient(args.server, _token(args.token_file), ca=args.ca) as client:
            await action(client, args)

    asyncio.run(main())


def _token(path: Path) -> str:
    if given := os.environ.get("FEDTT_ADMIN_TOKEN"):
        return _token_text(given, "FEDTT_ADMIN_TOKEN", "…")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ConfigError(
            "--token-file",
            str(path),
            f"a readable file ({error.strerror}), such as admin-token in the server's data directory, "
            "or set FEDTT_ADMIN_TOKEN",
        ) from None
    return _token_text(data.decode(errors="replace").strip(), "--token-file", str(path))


def _token_text(text: str, field: str, shown: str) -> str:
    """The token, if it can be one; `shown` stands for it in the error."""
    if not (text.isascii() and text.isprintable() and text):
        raise ConfigError(field, shown, "one line with the token that `fedtt serve` wrote to admin-token")
    return text


def _serve(args: argparse.Namespace) -> None:
    from aggregator.app import ServerConfig
    from aggregator.limits import raise_file_limit
    from aggregator.logs import set_up_log

    set_up_log(as_json=args.log_json)
    config = ServerConfig(
        data=args.data,
        host=args.host,
        port=args.port,
        admin_host=args.admin_host,
        admin_port=args.admin_port,
        database=args.database,
        blobs=args.blobs,
        server_key=args.server_key,
        forwarded=args.behind_proxy,
        tls_cert=args.tls_cert,
        tls_key=args.tls_key,
        reuse_port=args.reuse_port,
    )
    sys.setswitchinterval(_SWITCH_S)
    raise_file_limit()
    asyncio.run(_serve_until_stopped(config, drain_s=args.drain_s, as_json=args.json))


async def _serve_until_stopped(config: Any, *, drain_s: float, as_json: bool) -> None:
    import signal

    from aggregator.app import serving

    stopped = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stopped.set)
    async with serving(config) as listening:
        _announce(listening, config.data, as_json=as_json)
        await stopped.wait()
        listening.service.draining = True  # /readyz says so, and a balancer sends nobody any more
        await asyncio.sleep(drain_s)
    if not as_json:
        print("stopped; everything acknowledged is on disk")


def _announce(listening: Listening, data: Path, *, as_json: bool) -> None:
    dashboard = reachable(listening.admin_url) + "/"
    if as_json:
        print_json(
            {
                "event": "listening",
                "url": listening.url,
                "admin_url": listening.admin_url,
                "dashboard_url": dashboard,
                "enrolment_token": listening.enrolment_token,
                "admin_token_file": str(data / "admin-token"),
            }
        )
        return
    print(f"devices   {listening.url}")
    print(f"people    {listening.admin_url}  (token in {data / 'admin-token'})")
    print(f"dashboard {dashboard}")
    print(
        f"enrol     fedtt client run --server {reachable(listening.url)} "
        f"--token {listening.enrolment_token} --data examples.jsonl",
        flush=True,
    )


def reachable(url: str) -> str:
    """The address for other machines: this one's name where the server listens on all of its addresses."""
    for everywhere in ("//0.0.0.0:", "//[::]:"):
        url = url.replace(everywhere, f"//{socket.gethostname()}:")
    return url
