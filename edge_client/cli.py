"""`fedtt client …`, `fedtt predict` and `fedtt evaluate`: their arguments.

What they do is imported when they run, so that `fedtt --help` stays quick.
"""

from __future__ import annotations

import argparse
import os
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from fedtt.cli import Run, add_command, add_group

if TYPE_CHECKING:
    from fedtt.cli import Commands

__all__ = ["register"]


def register(commands: Commands) -> None:
    """Add this program's commands to `fedtt`."""
    below = add_group(
        commands,
        "client",
        about="run a device that trains on its own data, and rule it",
        examples="""
            fedtt client run --server https://fedtt.example.org --token TOKEN --data examples.jsonl
            fedtt client forget
        """,
    )
    _add_run(below)
    _add_data(below)
    _add_rule(below)
    _add_model(commands)


def _later(name: str) -> Run:
    """A command whose module is imported when it runs."""
    module, _, function = name.partition(":")

    def run(args: argparse.Namespace) -> int | None:
        status: int | None = getattr(import_module(f"edge_client.{module}"), function)(args)
        return status

    return run


def _home(parser: argparse.ArgumentParser) -> None:
    default = Path(os.environ.get("FEDTT_HOME") or Path.home() / ".fedtt")
    parser.add_argument(
        "--home", type=Path, default=default, metavar="DIR", help="the device's directory (%(default)s)"
    )


def _add_run(commands: Commands) -> None:
    run = add_command(
        commands,
        "run",
        about="take part: train on this device's examples and send what was learned",
        examples="""
        fedtt client run --server https://models.example.org --token T0K3N --data examples.jsonl
        fedtt client run --home /var/lib/fedtt --yes          (again, once enrolled)
        fedtt client run --once --json                        (one participation, for a scheduler)
        """,
        run=_later("client_commands:run"),
    )
    _home(run)
    run.add_argument(
        "--server", metavar="URL", help="the aggregator's address; remembered, and another is asked about"
    )
    run.add_argument("--token", default="", help="enrolment token, for the first run (or FEDTT_TOKEN)")
    run.add_argument(
        "--data",
        type=Path,
        metavar="FILE",
        help="examples (.jsonl or .csv) in place of those kept from it before",
    )
    run.add_argument(
        "--release-key",
        default="",
        metavar="HEX",
        help="run only bundles that this key signed, for servers that it vouches for "
        "(default: the one that the server names when this device enrols)",
    )
    run.add_argument(
        "--ca",
        type=Path,
        metavar="FILE",
        help="trust the server's certificate by those in this file (default: this machine's); remembered",
    )
    run.add_argument("--once", action="store_true", help="end after one participation, or when told to wait")
    run.add_argument("--yes", action="store_true", help="agree to take part without being asked")
    run.add_argument("--cache", type=Path, metavar="DIR", help="bundles that several devices share")
    run.add_argument(
        "--cache-limit-mb",
        type=int,
        default=4096,
        metavar="N",
        help="MiB of bundles to keep; the longest unused make room (%(default)s)",
    )
    run.add_argument(
        "--activation-limit-mb",
        type=int,
        default=256,
        metavar="N",
        help="MiB of disk for what the frozen part of the model gives of each example, where only its last "
        "blocks are trained (%(default)s)",
    )
    run.add_argument(
        "--memory-mb",
        type=int,
        default=0,
        metavar="N",
        help="MiB that training may use: the server is told, and may give this device a smaller rank; a task "
        "that says it may need more is declined (judging needs less)",
    )
    run.add_argument(
        "--max-training-s",
        type=float,
        metavar="S",
        help="decline work that takes longer than so many seconds to train or judge, and end it there (no "
        "limit; in any case it ends a day after the work is due)",
    )
    run.add_argument(
        "--max-download-mb",
        type=int,
        metavar="N",
        help="decline work that needs a larger download, in MiB (no limit)",
    )
    run.add_argument(
        "--share-label-counts",
        type=float,
        default=0.0,
        metavar="EPSILON",
        help="tell a server that asks how many examples of each label there are, once, with noise for "
        "differential privacy of at most this epsilon (1 is much noise, 10 little); without it, never",
    )
    run.add_argument(
        "--no-judging", action="store_true", help="never say how well a new version does on these examples"
    )
    _add_limits(run)
    run.add_argument(
        "--threads", type=int, default=1, metavar="N", help="threads to train with (%(default)s)"
    )
    run.add_argument(
        "--runtime",
        choices=("onnxruntime", "executorch"),
        default="onnxruntime",
        help="what runs the graphs (%(default)s); the bundle must be exported for it",
    )


def _add_limits(run: argparse.ArgumentParser) -> None:
    limits = run.add_argument_group(
        "conditions",
        "without them nothing is asked for, and what is under way ends at its next pass; "
        "files in HOME/conditions say what Linux does not know: battery, charging, unmetered, idle, "
        "temperature_c, memory_mb",
    )
    for name, about in {
        "charging": "runs on power from outside",
        "unmetered": "is on a network that is not metered",
        "idle": "is not in use by others",
    }.items():
        limits.add_argument(f"--only-{name}", action="store_true", help=f"work while this device {about}")
    limits.add_argument(
        "--min-battery",
        type=float,
        default=0.2,
        metavar="SHARE",
        help="work with no less charge, where there is a battery (%(default)s)",
    )
    limits.add_argument(
        "--max-temperature-c", type=float, metavar="C", help="work while no part of it is hotter (no limit)"
    )


def _add_data(commands: Commands) -> None:
    add = add_command(
        commands,
        "add",
        about="keep examples on this device, also while a client is running",
        examples="""
        fedtt client add --data examples.csv
        fedtt client add --text "wake me at seven" --label set_alarm
        """,
        run=_later("client_commands:add"),
    )
    _home(add)
    what = add.add_mutually_exclusive_group(required=True)
    what.add_argument("--data", type=Path, metavar="FILE", help=".jsonl or .csv, replacing its earlier rows")
    what.add_argument("--text", help="one example")
    add.add_argument("--text-pair", metavar="TEXT", help="the second text, where the task is about two")
    add.add_argument("--label", help="name or index of the label of --text")


def _add_rule(commands: Commands) -> None:
    rules = {
        "status": "show what this device has done and keeps",
        "pause": "rest: nothing is trained or sent until `resume`",
        "resume": "go on after `pause`",
        "leave": "leave the population and withdraw consent; examples stay here",
        "forget": "delete examples, bundles, residuals and key here, and have the server erase the device",
    }
    for name, about in rules.items():
        parser = add_command(
            commands,
            name,
            about=about,
            examples=f"fedtt client {name}\nfedtt client {name} --home /var/lib/fedtt --json",
            run=_later(f"client_commands:{name}"),
        )
        _home(parser)
        if name == "forget":
            parser.add_argument("--local-only", action="store_true", help="do not ask the server")


def _add_model(commands: Commands) -> None:
    predict = add_command(
        commands,
        "predict",
        about="use a downloaded version: label texts, or continue them",
        examples="""
        fedtt predict ./version "wake me at seven"
        fedtt predict ./version --bundle ./bundle --json "lights off" "add milk to the list"
        """,
        run=_later("model_commands:predict"),
    )
    predict.add_argument("version", type=Path, metavar="VERSION_DIR")
    predict.add_argument("texts", nargs="+", metavar="TEXT")
    predict.add_argument("--text-pair", metavar="TEXT", help="the second text, read together with each TEXT")
    evaluate = add_command(
        commands,
        "evaluate",
        about="measure a downloaded version on labelled examples",
        examples="""
        fedtt evaluate ./version test.jsonl
        fedtt evaluate ./version test.csv --bundle ./bundle --json
        """,
        run=_later("model_commands:evaluate"),
    )
    evaluate.add_argument("version", type=Path, metavar="VERSION_DIR")
    evaluate.add_argument("file", type=Path, metavar="FILE", help=".jsonl or .csv with text and label")
    for parser in (predict, evaluate):
        parser.add_argument("--bundle", type=Path, metavar="DIR", help="its bundle (VERSION_DIR/bundle)")
        parser.add_argument(
            "--threads", type=int, default=1, metavar="N", help="threads to use (%(default)s)"
        )
