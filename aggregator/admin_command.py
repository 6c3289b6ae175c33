"""What commands share that ask a running server for something: options, token, pages and tables."""

from __future__ import annotations

import argparse
import asyncio
import os
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedtt.cli import add_command, print_json
from fedtt.errors import ConfigError

if TYPE_CHECKING:
    from aggregator.admin_client import AdminClient
    from fedtt.cli import Commands

__all__ = ["Row", "admin_command", "expires_argument", "expires_s", "pages", "print_rows", "print_token"]

Row = dict[str, Any]
Action = Callable[["AdminClient", argparse.Namespace], Awaitable[None]]
_LIMIT_S = 10**9


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


def expires_argument(parser: argparse.ArgumentParser) -> None:
    """How long a token that the command makes is good for; `expires_s` reads it."""
    parser.add_argument("--expires-s", type=float, help="seconds for which it is good (default for ever)")


def expires_s(args: argparse.Namespace) -> float | None:
    """Raises ConfigError where it is none."""
    given: float | None = args.expires_s
    if given is not None and not 0 < given <= _LIMIT_S:
        raise ConfigError("--expires-s", given, "seconds above 0, at most 1e9")
    return given


def print_token(made: Row, args: argparse.Namespace) -> None:
    """The token alone, so that a script can take it as it is; it is shown this once."""
    print_json(made) if args.json else print(made["token"])


async def pages(client: AdminClient, path: str, key: str) -> list[Row]:
    """All rows of a listing that is read page by page: each begins behind the last row's `key`."""
    rows: list[Row] = []
    while page := await client.rows(f"{path}?after={rows[-1][key]}" if rows else path):
        rows += page
    return rows


def print_rows(rows: list[Row], args: argparse.Namespace, columns: tuple[str, ...]) -> None:
    """JSON, one object a line; or a table for people."""
    if args.json:
        for row in rows:
            print_json(row)
        return
    from aggregator.progress import table

    table(rows, columns)
