"""What `fedtt client …` does."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from argparse import Namespace
from contextlib import closing, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

from edge_client import events
from edge_client.conditions import Limits
from edge_client.consent import ask, consent_text
from edge_client.describe import describe
from edge_client.device_config import DeviceConfig
from edge_client.events import Event, Step
from edge_client.example_files import read_examples
from edge_client.examples import ExampleStore
from edge_client.freed_memory import give_freed_memory_back
from edge_client.home import Home
from edge_client.journal import read_state
from edge_client.local_trainer import LocalTrainer
from edge_client.onnx_runtime import onnx_runtimes
from edge_client.runtime import Runtimes
from edge_client.server_address import server_url
from edge_client.session import forget as forget_home
from edge_client.session import leave as leave_server
from edge_client.session import open_device, supervise
from fedtt.cli import print_json
from fedtt.errors import ConfigError, StorageError
from fedtt.release import parse_public_key

__all__ = ["add", "forget", "leave", "pause", "resume", "run", "status"]


def run(args: Namespace) -> int:
    """Take part until stopped, retired, or with --once until one participation has ended."""
    give_freed_memory_back()
    home = Home(args.home)
    known = read_state(home)
    server = args.server or (known.server if known else "")
    if not server:
        raise ConfigError("--server", None, "the address of the aggregator, for the first run")
    server_url(server)  # nothing is made for, or asked about, an address that is none
    runtimes = _runtimes(args.runtime, args.threads)  # what cannot train asks for no work
    rows = read_examples(args.data) if args.data else None
    if args.once and home.is_paused():
        raise StorageError(f"{home.directory} is paused by its owner: fedtt client resume --home {args.home}")
    home.create()
    with closing(ExampleStore(home.examples)) as store:
        old_server = known.server if known and known.enrolled and known.server != server else ""
        if known is None or known.consented_at is None or known.server != server:
            count = store.count() if rows is None else len(rows)
            text = consent_text(
                server, args.home, count, old_server=old_server, label_epsilon=args.share_label_counts
            )
            if not ask(text, given=args.yes):
                print("not taking part: nothing was sent", file=sys.stderr)
                return 1
        if rows is not None:
            store.replace_file(str(args.data.absolute()), rows)
        try:
            return asyncio.run(_run(args, home, server, store, runtimes, move=bool(old_server)))
        except asyncio.CancelledError:
            raise KeyboardInterrupt from None


def _runtimes(name: str, threads: int) -> Runtimes:
    if name == "onnxruntime":
        return onnx_runtimes(threads)
    from edge_client.executorch_runtime import executorch_runtimes  # not in the memory of the other

    return executorch_runtimes(threads)


async def _run(
    args: Namespace, home: Home, server: str, store: ExampleStore, runtimes: Runtimes, *, move: bool
) -> int:
    config = DeviceConfig(
        token=args.token or os.environ.get("FEDTT_TOKEN", ""),
        client=f"fedtt-edge {version('fedtt')}",
        memory_mb=args.memory_mb,
        max_training_s=args.max_training_s,
        max_download_mb=args.max_download_mb,
        activation_limit_mb=args.activation_limit_mb,
        label_epsilon=args.share_label_counts,
        judges=not args.no_judging,
        limits=Limits(
            only_charging=args.only_charging,
            only_unmetered=args.only_unmetered,
            only_idle=args.only_idle,
            min_battery=args.min_battery,
            max_temperature_c=args.max_temperature_c,
        ),
    )
    show = print_json if args.json else _show
    # not by Ctrl-C, which a shell has what it starts in the background ignore
    if task := asyncio.current_task():
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    async with open_device(
        home.directory,
        server=server,
        examples=store,
        config=config,
        move=move,
        ca=args.ca,
        release_key=parse_public_key(args.release_key, "--release-key") if args.release_key else b"",
        cache=args.cache,
        cache_limit_bytes=args.cache_limit_mb << 20,
        trainer=LocalTrainer(runtimes, keeps_tokenizers=False),
        observe=show,
    ) as device:
        await device.consent()
        last = await supervise(device, home, _ended if args.once else _never, show)
    return 2 if isinstance(last, events.Retrying | events.GaveUp) else 0


def _show(event: Event) -> None:
    print(describe(event), flush=True)


def _never(_: Step) -> bool:
    return False


def _ended(step: Step) -> bool:
    """Whether one participation is over, well or badly, or there is none to be had."""
    badly = (events.Dropped, events.GaveUp, events.Retrying)
    return isinstance(step, (events.Waiting, events.Resting, events.Acknowledged, *badly))


def add(args: Namespace) -> None:
    """Keep one example, or the rows of a file."""
    home = Home(args.home)
    for option in ("label", "text_pair"):
        if (value := getattr(args, option)) is not None and args.text is None:
            name = f"--{option.replace('_', '-')}"
            raise ConfigError(name, value, "goes with --text; the rows of a file bring their own")
    rows = read_examples(args.data) if args.data else None
    home.create()
    with closing(ExampleStore(home.examples)) as store:
        if rows is None:
            store.add(args.text, args.label, text_pair=args.text_pair)
        else:
            store.replace_file(str(args.data.absolute()), rows)
        _answer(args, {"examples": store.count()}, "{examples} examples are kept")


def status(args: Namespace) -> None:
    """Show what the journal and the directory say."""
    home = _known_home(args)
    state = read_state(home)
    count = 0
    if home.examples.exists():
        with closing(ExampleStore(home.examples)) as store:
            count = store.count()
    found: dict[str, Any] = {
        "home": str(home.directory),
        "running": home.is_running(),
        "paused": home.is_paused(),
        "server": state.server if state else "",
        "device": state.device if state else "",
        "consented": bool(state and state.consented_at is not None),
        "enrolled": bool(state and state.enrolled),
        "release_key": state.release_key.hex() if state else "",
        "phase": type(state.phase).__name__.lower() if state else "idle",
        "acknowledged": state.acknowledged if state else 0,
        "last_receipt": state.receipt if state else None,
        "examples": count,
        "residual_bytes": sum(len(kept.data) for kept in state.residuals.values()) if state else 0,
        "bundle_bytes": _bytes_in(home.bundles),
    }
    if args.json:
        print_json(found)
        return
    for name, value in found.items():
        print(f"{name.replace('_', ' '):15} {value if value != '' else '-'}")


def _bytes_in(directory: Path) -> int:
    """Of files; what vanishes meanwhile, as where a client downloads, counts nothing."""
    size = 0
    for parent, _, names in os.walk(directory):
        for name in names:
            with suppress(FileNotFoundError):
                size += Path(parent, name).stat().st_size
    return size


def pause(args: Namespace) -> None:
    _known_home(args).pause(True)
    _answer(args, {"paused": True}, "paused: a running client rests within a second or one pass of its work")


def resume(args: Namespace) -> None:
    _known_home(args).pause(False)
    _answer(args, {"paused": False}, "resumed")


def leave(args: Namespace) -> None:
    was_enrolled = asyncio.run(leave_server(_known_home(args)))
    _answer(args, {"left": was_enrolled}, "left the population" if was_enrolled else "was not enrolled")


def forget(args: Namespace) -> None:
    home = _known_home(args)
    asyncio.run(forget_home(home, local_only=args.local_only))
    _answer(args, {"forgotten": True, "server_asked": not args.local_only}, "everything here is deleted")


def _known_home(args: Namespace) -> Home:
    home = Home(args.home)
    if not home.exists:
        raise StorageError(f"{home.directory} does not exist: name the device's directory with --home")
    return home


def _answer(args: Namespace, found: dict[str, Any], line: str) -> None:
    print_json(found) if args.json else print(line.format(**found))
