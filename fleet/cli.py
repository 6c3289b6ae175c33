"""`fedtt demo`, `fedtt fleet` and `fedtt judge`."""

from __future__ import annotations

import argparse
import asyncio
import signal
from pathlib import Path
from typing import TYPE_CHECKING

from fedtt.cli import add_command, print_json
from fleet.fleet_commands import register_fleet
from fleet.judge_command import register_judge

if TYPE_CHECKING:
    from fedtt.cli import Commands
    from fleet.demo import DemoOptions, Outcome

__all__ = ["register"]


def register(commands: Commands) -> None:
    demo = add_command(
        commands,
        "demo",
        about="export a real encoder, train it on 45 devices over loopback HTTP, and try the result",
        examples="""
            fedtt demo
            fedtt demo --rounds 5 --json
            fedtt demo --model ./my-encoder --fresh
        """,
        run=_demo,
    )
    add, default = demo.add_argument, "(default %(default)s)"
    add("--dir", type=Path, default=Path("demo-run"), help=f"where bundle, run and result go {default}")
    add("--rounds", type=int, default=20, help=f"rounds to train {default}")
    add("--devices", type=int, default=45, help=f"devices that train, at most 45 {default}")
    add("--seed", type=int, default=0, help=f"of sampling, batches and first factors {default}")
    add("--model", help="encoder directory or hub id (default the MiniLM-L6 of the demo extra)")
    add("--fresh", action="store_true", help="export again even if a bundle is there")
    register_fleet(commands)
    register_judge(commands)


def _demo(args: argparse.Namespace) -> None:
    from fleet.demo import DemoOptions

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # end the server process on the way out
    options = DemoOptions(
        directory=args.dir,
        rounds=args.rounds,
        devices=args.devices,
        seed=args.seed,
        model=args.model,
        fresh=args.fresh,
    )
    if args.json:
        asyncio.run(_for_machines(options))
    else:
        _for_people(options)


async def _for_machines(options: DemoOptions) -> None:
    from fleet.demo import run_demo

    print_json(await run_demo(options, lambda _: None, print_json))


def _for_people(options: DemoOptions) -> None:
    from fleet.demo import run_demo
    from fleet.display import RoundDisplay

    with RoundDisplay(options.rounds) as display:
        outcome = asyncio.run(run_demo(options, display.say, display.show))
    _print_outcome(outcome)


def _print_outcome(outcome: Outcome) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title="accuracy on people whose devices never trained")
    for column in ("before", "after", "rounds", "up / participation", "down / participation", "time"):
        table.add_column(column, justify="right")
    table.add_row(
        f"{outcome.accuracy_before:.1%}",
        f"{outcome.accuracy_after:.1%}",
        str(outcome.rounds),
        f"{outcome.uplink_bytes_per_participation / 1000:.1f} kB",
        f"{outcome.downlink_bytes_per_participation / 1000:.1f} kB",
        f"{outcome.wall_s:.0f} s",
    )
    console = Console()
    console.print(table)
    console.print(f"The trained model is in [bold]{outcome.result}[/bold]. Try it:")
    console.print(f'  .venv/bin/fedtt predict {outcome.result} "wake me at seven"', soft_wrap=True)
