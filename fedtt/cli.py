"""The `fedtt` program: sub-commands come from the entry-point group `fedtt.commands`.

Each entry point is a function `register(commands)` that calls `add_command` for what its program
offers and imports nothing heavy, so `fedtt --help` is quick and the core imports no program.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import entry_points, version
from typing import TypeAlias

import msgspec

from fedtt.errors import FedttError

__all__ = ["Commands", "Run", "add_command", "add_group", "main", "make_parser", "one_line", "print_json"]

GROUP = "fedtt.commands"
OURS = {"aggregator", "edge_client", "export", "fedtt", "fleet", "storage"}
Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"
Run = Callable[[argparse.Namespace], int | None]  #: returns the exit status, None for 0


def add_command(
    commands: Commands, name: str, *, about: str, examples: str, run: Run
) -> argparse.ArgumentParser:
    """Add one sub-command with `--json`; `examples` are shown at the end of its help."""
    parser = _add_parser(commands, name, about, examples)
    parser.add_argument("--json", action="store_true", help="print JSON for machines, one object a line")
    parser.set_defaults(run=run)
    return parser


def add_group(commands: Commands, name: str, *, about: str, examples: str) -> Commands:
    """Add a command that only holds others, such as `fedtt task`."""
    parser = _add_parser(commands, name, about, examples)
    return parser.add_subparsers(title="commands", metavar="COMMAND", required=True)


def _add_parser(commands: Commands, name: str, about: str, examples: str) -> argparse.ArgumentParser:
    return commands.add_parser(
        name,
        help=about,
        description=about[0].upper() + about[1:] + ".",
        epilog="examples:\n" + "\n".join(f"  {line.strip()}" for line in examples.strip().splitlines()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def print_json(value: object) -> None:
    """One JSON object on a line of its own, flushed, so that a reader sees it at once.

    In ASCII, with JSON's own escapes, where the output is not in Unicode.
    """
    line = msgspec.json.encode(value).decode()
    if not line.isascii() and not (sys.stdout.encoding or "utf").lower().startswith("utf"):
        line = json.dumps(json.loads(line), separators=(",", ":"))
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def one_line(text: str) -> str:
    """The text, with escapes for what would begin a line or command a terminal: it may be a stranger's."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fedtt",
        description="Fine-tune small language models on data that never leaves people's devices.",
        epilog="examples:\n  fedtt demo\n  fedtt export ./my-model --labels labels.json --out bundle\n"
        "  fedtt serve --data ./server\n  fedtt client run --help",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"fedtt {version('fedtt')}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for entry in sorted(entry_points(group=GROUP), key=lambda entry: entry.name):
        try:
            register = entry.load()
        except ModuleNotFoundError as error:
            _add_missing(commands, entry.name, error.name or "?")
            continue
        known = set(commands.choices)
        register(commands)
        for name in commands.choices.keys() - known:
            commands.choices[name].set_defaults(extra=entry.name)
    return parser


def _add_missing(commands: Commands, extra: str, module: str) -> None:
    """Keep a program whose extra is not installed visible, and say how to get it."""

    def run(_: argparse.Namespace) -> int:
        raise FedttError(f"'fedtt {extra}' needs the package {module}: pip install 'fedtt[{extra}]'")

    commands.add_parser(extra, help=f"not installed (pip install 'fedtt[{extra}]')").set_defaults(run=run)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; what went wrong is one line on stderr and status 2, Ctrl-C is status 130."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # of what its encoding lacks, as stderr does
    args = make_parser().parse_args(argv)
    try:
        status = args.run(args) or 0
        sys.stdout.flush()  # here, where it can still be said that this failed
        return status
    except FedttError as error:
        print(f"fedtt: error: {one_line(str(error))}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        module = (error.name or "").partition(".")[0]
        if not module or module in OURS:
            raise
        print(
            f"fedtt: error: this command needs {module}: pip install 'fedtt[{args.extra}]'", file=sys.stderr
        )
        return 2
    except KeyboardInterrupt:
        print("fedtt: stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:
        _say_no_more()
        return 0
    except OSError as error:  # of a file, or of the output itself, as on a full disk
        what = error.filename or "reading or writing failed"
        print(f"fedtt: error: {one_line(f'{what}: {error.strerror or error}')}", file=sys.stderr)
        _say_no_more()
        return 2


def _say_no_more() -> None:
    """What was printed and cannot be written is dropped, or the interpreter would try again at its end."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
