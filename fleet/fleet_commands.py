"""`fedtt fleet`."""

from __future__ import annotations

import argparse
import asyncio
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

from fedtt.cli import add_command, add_group, print_json
from fedtt.errors import ConfigError, FedttError

if TYPE_CHECKING:
    from fedtt.cli import Commands
    from fleet import run_files
    from fleet.experiment import Experiment
    from fleet.pool import Pool
    from fleet.pools import Opener

__all__ = ["register_fleet"]


class _Told(TypedDict):
    """What both ways of living an experiment are told."""

    fresh: bool
    stopped: Callable[[], bool]
    opener: Opener | None
    on_version: Callable[[run_files.VersionLine], None]


def register_fleet(commands: Commands) -> None:
    """Add `fedtt fleet` and what it holds."""
    group = add_group(
        commands,
        "fleet",
        about="emulate many devices against the real aggregator, in virtual time",
        examples="fedtt fleet run experiment.toml",
    )
    run = add_command(
        group,
        "run",
        about="live an experiment to its end, or go on with one that was cut short",
        examples="""
            fedtt fleet run experiment.toml
            fedtt fleet run experiment.toml --dir runs/first --json
            fedtt fleet run experiment.toml --server http://127.0.0.1:8440 --token TOKEN
            fedtt fleet run experiment.toml --ray --ray-workers 16 --ray-address auto
        """,
        run=_run_fleet,
    )
    run.add_argument("file", type=Path, help="fleet file (TOML, see docs/fleet.md)")
    run.add_argument("--dir", type=Path, help="where results go (default the file's name with -run)")
    run.add_argument("--fresh", action="store_true", help="begin anew what was begun there")
    run.add_argument(
        "--server", help="address of a running server: its task, and real time, in place of ours"
    )
    run.add_argument("--token", help="enrolment token of that server")
    run.add_argument("--ray", action="store_true", help="train in several processes (the extra 'ray')")
    run.add_argument("--ray-workers", type=int, metavar="N", help="how many (default 2)")
    run.add_argument(
        "--ray-address",
        metavar="ADDR",
        help="HOST:PORT of a cluster's head, or auto for this machine's (default: no other machine)",
    )
    report = add_command(
        group,
        "report",
        about="plot what a run has left, or several over one another, in one HTML file",
        examples="""
            fedtt fleet report experiment-run
            fedtt fleet report runs/fedtt runs/fedlora --out compared.html
        """,
        run=_report,
    )
    report.add_argument("directories", type=Path, nargs="+", metavar="DIR", help="directory of a run")
    add, default = report.add_argument, "(default %(default)s)"
    add("--out", type=Path, default=Path("report.html"), help=f"where the page goes {default}")


def _run_fleet(args: argparse.Namespace) -> int:
    from fleet.experiment import prepare
    from fleet.fleet_file import naming, read_fleet
    from fleet.pool import PoolLost
    from fleet.report import write_report

    _check_together(args)
    directory = args.dir or Path(f"{args.file.stem}-run")
    spec = read_fleet(args.file)
    if args.server is not None and spec.fleet.bound is not None:
        raise ConfigError("fleet.bound", spec.fleet.bound, "none with --server")
    with naming(args.file):
        experiment = prepare(spec)
    experiment, opener = _over_ray(args, experiment)
    try:
        outcome = _lived(args, experiment, directory, _ask_to_stop(), opener)
    except PoolLost as error:
        raise FedttError(f"{error}; the same command goes on from here") from None
    write_report([directory], directory / "report.html")
    if args.json:
        print_json(outcome)
    else:
        _print_fleet(outcome, args.file, goes_on=args.server is None)
    return {"finished": 0, "interrupted": 130}.get(outcome.state, 1)


def _check_together(args: argparse.Namespace) -> None:
    """Refuse options that mean nothing without others."""
    if args.server is not None and not args.token:
        raise ConfigError(
            "--token", args.token, "an enrolment token of the server, which 'fedtt serve' prints"
        )
    for name, value in (("--ray-workers", args.ray_workers), ("--ray-address", args.ray_address)):
        if value is not None and not args.ray:
            raise ConfigError(name, value, "given together with --ray")


def _over_ray(args: argparse.Namespace, experiment: Experiment) -> tuple[Experiment, Opener | None]:
    """How the pool that was asked for is opened, once all else is in order; None for this process's.

    Other bits than those of one process make it an experiment of its own.
    """
    if not args.ray:
        return experiment, None
    from fleet.ray_pool import RayPool, check_workers, fingerprint

    fleet, workers = experiment.spec.fleet, 2 if args.ray_workers is None else args.ray_workers
    check_workers(workers, args.ray_address)

    def opener(name: str) -> tuple[str, Pool]:
        pool = RayPool(
            experiment.bundle,
            name,
            workers=workers,
            threads=fleet.threads,
            model=fleet.model,
            address=args.ray_address,
        )
        return pool.trainer, pool

    over = fingerprint(workers, fleet.threads, args.ray_address)
    return replace(experiment, fingerprint=f"{experiment.fingerprint} {over}"), opener


def _lived(
    args: argparse.Namespace,
    experiment: Experiment,
    directory: Path,
    stopped: Callable[[], bool],
    opener: Opener | None,
) -> run_files.Outcome:
    """By the emulation, or against a server; each version is shown as it appears."""
    from fleet.display import FleetDisplay
    from fleet.live import live_against
    from fleet.run import run_fleet

    def run(on_version: Callable[[run_files.VersionLine], None]) -> run_files.Outcome:
        told: _Told = {"fresh": args.fresh, "stopped": stopped, "opener": opener, "on_version": on_version}
        if args.server is None:
            return run_fleet(experiment, directory, **told)
        return asyncio.run(live_against(args.server, args.token, experiment, directory, **told))

    if args.json:
        return run(print_json)
    total = experiment.spec.task.rounds.count if args.server is None else None
    with FleetDisplay(total) as display:
        return run(display.show if args.server is None else display.show_seen)


def _report(args: argparse.Namespace) -> None:
    from fleet.report import write_report

    write_report(args.directories, args.out)
    if args.json:
        print_json({"report": str(args.out)})
    else:
        print(f"{args.out} shows it: open it in a browser")


def _ask_to_stop() -> Callable[[], bool]:
    """Whether the run was asked to end: at the first Ctrl-C it does so in order, the second is final."""
    asked = False

    def ask(number: int, frame: object) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True

    signal.signal(signal.SIGINT, ask)
    signal.signal(signal.SIGTERM, ask)
    return lambda: asked


def _print_fleet(outcome: run_files.Outcome, file: Path, *, goes_on: bool) -> None:
    """goes_on: whether what was stopped can be gone on with."""
    from rich.console import Console

    say = Console(highlight=False, soft_wrap=True).print
    if goes_on and outcome.state == "interrupted" and outcome.versions is not None:
        say(f"stopped after version {outcome.versions}; go on with")
        say(f"  fedtt fleet run {file} --dir {outcome.directory}")
        return
    accuracy = "" if outcome.accuracy is None else f", accuracy {outcome.accuracy:.1%}"
    counted = (
        f": {outcome.versions} versions" if goes_on else f", devices were given version {outcome.versions}"
    )
    versions = "" if outcome.versions is None else counted
    say(f"task {outcome.task} {outcome.state}{accuracy}{versions}", end="")
    theirs = f"{outcome.virtual_s / 3600:.2f} h of the devices' time, " if outcome.virtual_s else ""
    say(f" in {theirs}{outcome.wall_s:.0f} s of ours")
    if outcome.reason:
        say(f"because {outcome.reason}")
    if outcome.sent_bytes or outcome.left_out:
        _print_work(outcome, say)
    say(f"everything lies in {outcome.directory}, and {Path(outcome.directory) / 'report.html'} shows it")


def _print_work(outcome: run_files.Outcome, say: Callable[..., None]) -> None:
    say(f"{outcome.took_part} of {outcome.devices} devices took part; what came of their work:")
    for name, count in sorted(outcome.outcomes.items()):
        say(f"  {count:8d} {name}")
    for reason, count in outcome.left_out.items():
        say(f"  {count:8d} devices left out: {reason}")
    say(f"{outcome.check_ins} check-ins, {outcome.sent_bytes / 1e6:.2f} MB up", end="")
    say(f", {outcome.received_bytes / 1e6:.2f} MB down", end="")
    say(f", bundles {outcome.bundle_bytes / 1e6:.1f} MB")
