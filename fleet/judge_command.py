"""`fedtt judge`: versions judged on a file before devices train from them, for the server runs no model."""

from __future__ import annotations

import argparse
import asyncio
import itertools
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import msgspec

from aggregator.admin_command import admin_command, print_rows
from fedtt.errors import ConfigError, FedttError
from fedtt.messages import Judged, Verdict

if TYPE_CHECKING:
    from aggregator.admin_client import AdminClient
    from edge_client.inference import Evaluation
    from fedtt.cli import Commands
    from fleet.evaluation import Judge

__all__ = ["register_judge"]

_COLUMNS = (
    "number",
    "state",
    "judged_worse_by",
    "judged_loss_before",
    "judged_loss",
    "judged_accuracy",
    "reason",
)
_ENDED = {"finished", "stopped"}


def register_judge(commands: Commands) -> None:
    """Add `fedtt judge`."""
    judge = admin_command(
        commands,
        "judge",
        about="judge each new version of a task on a file, and so release or hold it",
        examples="""
            fedtt judge my-task --data test.jsonl
            fedtt judge my-task --data test.jsonl --once --json
        """,
        action=_judge,
    )
    judge.add_argument("task", help="name of the task; its file has a section [evaluation]")
    judge.add_argument("--data", type=Path, required=True, help="JSON lines or CSV that no device trains on")
    judge.add_argument("--once", action="store_true", help="judge what waits now, then end")
    judge.add_argument("--threads", type=int, default=1, help="of the runtime (default %(default)s)")
    judge.add_argument("--every-s", type=float, default=2.0, help="between two looks (default %(default)s)")


async def _judge(client: AdminClient, args: argparse.Namespace) -> None:
    from edge_client.example_files import read_examples
    from fleet.evaluation import Judge

    examples = await asyncio.to_thread(read_examples, args.data)
    task = await client.task(args.task)
    if task["spec"]["evaluation"] is None:
        raise ConfigError("task", args.task, "one whose file has a section [evaluation]")
    with TemporaryDirectory(prefix="fedtt-judge-") as directory:
        bundle = Path(directory) / "bundle"
        await client.download_bundle(task["bundle"], bundle)
        judging = _Judging(client, args, Judge(bundle, examples, threads=args.threads))
        while True:
            task = await client.task(args.task)
            await judging.settle()
            if args.once or task["state"] in _ENDED:
                return
            await asyncio.sleep(args.every_s)


class _Judging:
    """Verdicts on one task; what a version came to is remembered, for it is the next one's measure."""

    def __init__(self, client: AdminClient, args: argparse.Namespace, judge: Judge) -> None:
        self._client, self._args, self._judge = client, args, judge
        self._known: dict[str, Evaluation] = {}

    async def settle(self) -> None:
        """Judge every version that waits for it."""
        versions = await self._client.task(self._args.task, "/versions")
        for before, after in itertools.pairwise(versions):
            if after["state"] == "candidate":
                await self._settle(before, after)

    async def _settle(self, before: dict[str, Any], after: dict[str, Any]) -> None:
        was, is_now = await self._evaluated(before), await self._evaluated(after)
        verdict = Verdict(examples=is_now.examples, before=_judged(was), after=_judged(is_now))
        path = f"/tasks/{self._args.task}/versions/{after['number']}/verdict"
        try:
            settled = msgspec.json.decode(await self._client.call("POST", path, msgspec.json.encode(verdict)))
        except FedttError as error:  # somebody else has settled it meanwhile
            print(f"version {after['number']}: {error}", file=sys.stderr)
            return
        print_rows([settled if self._args.json else settled | settled["report"]], self._args, _COLUMNS)

    async def _evaluated(self, version: dict[str, Any]) -> Evaluation:
        sha256 = version["sha256"]
        if sha256 not in self._known:
            found = await self._judge.judge(self._client, self._args.task, version["number"])
            self._known = dict([*self._known.items(), (sha256, found)][-2:])
        return self._known[sha256]


def _judged(found: Evaluation) -> Judged:
    right = None if found.accuracy is None else round(found.accuracy * found.examples)
    return Judged(loss=found.loss, right=right)
