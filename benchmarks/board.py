"""The rehearsal of a board, for scripts/board: a client under another interpreter takes part in one round.

The model is the tests' tiny one: what counts is that every library and file works there. A client under this
interpreter, with ONNX Runtime, does the same beside it on batches of the same rows: both should come to the
same losses.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from aggregator.admin_client import AdminClient
from benchmarks.harness import Report, machine, reporting
from fleet.federation import Server, server_process

LABELS = ("alarm", "lights off", "pay", "weather")
ROWS = ("set the alarm for seven", "lights off please", "pay my card", "weather today")
TASK = """
name = "board"
[rounds]
count = 1
cohort = 1
buffer = 1
quorum = 1
deadline_s = 3600
[training]
local_steps = 3
batch_size = 4
[method]
name = "fedtt"
[codec]
quantise = "int8"
"""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.board", description=__doc__)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--runtime", choices=("onnxruntime", "executorch"), default="onnxruntime")
    parser.add_argument("--out", type=Path, help="also write the JSON lines to this file")
    parser.add_argument("interpreter", nargs="+", help="after --: what runs Python there")
    args = parser.parse_args()
    bundle = exported(args.work / f"bundle-{args.runtime}", args.work / "tiny", args.runtime)
    with reporting("board", args.out) as report:
        trained = {
            where: asyncio.run(rehearse(report, args.work, bundle, runtime, interpreter))
            for where, runtime, interpreter in (
                ("there", args.runtime, args.interpreter),
                ("here", "onnxruntime", [sys.executable]),
            )
        }
        losses = {where: (event["loss_first"], event["loss_last"]) for where, event in trained.items()}
        apart = max(abs(there - here) / abs(here) for there, here in zip(*losses.values(), strict=True))
        report.line(
            benchmark="board",
            figures={
                "runtime": args.runtime,
                "machine_there": machine_of(args.interpreter),
                "losses_apart": apart,
            },
            against={
                "losses_apart": "of a client under this interpreter with onnxruntime, relative",
                "losses": losses,
            },
            machine=machine(),
            command=f"scripts/board {args.runtime}",
        )


def machine_of(interpreter: list[str]) -> str:
    """Its processor's kind: aarch64."""
    command = [*interpreter, "-c", "import platform; print(platform.machine())"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def exported(bundle: Path, model: Path, runtime: str) -> Path:
    if not bundle.is_dir():
        from export import ExportRequest, export_bundle
        from tests.support.models import save_tiny_model

        export_bundle(
            ExportRequest(
                model=str(save_tiny_model(model)),
                labels=LABELS,
                bottleneck=8,
                rank=2,
                head_rank=2,
                max_tokens=32,
                runtimes=("onnxruntime",) if runtime == "onnxruntime" else ("onnxruntime", "executorch"),
            ),
            bundle,
        )
    return bundle


async def rehearse(
    report: Report, work: Path, bundle: Path, runtime: str, interpreter: list[str]
) -> dict[str, Any]:
    """One round; -> what the client said of its training. Ends the program where the round came to no end."""
    for name in ("server", "home"):
        shutil.rmtree(work / name, ignore_errors=True)
    data = work / "rows.jsonl"
    rows = zip(ROWS, LABELS, strict=True)
    data.write_text("".join(json.dumps({"text": text, "label": label}) + "\n" for text, label in rows))
    async with server_process(work / "server") as server:
        async with AdminClient(server.admin_url, server.admin_token) as admin:
            await admin.create_task(TASK, await admin.send_bundle(bundle))
        seen = await client(report, server, work / "home", data, runtime, interpreter)
    if "acknowledged" not in seen:
        raise SystemExit(f"the client sent nothing: {', '.join(seen) or 'it said nothing'}")
    return seen["trained"]


async def client(
    report: Report, server: Server, home: Path, data: Path, runtime: str, interpreter: list[str]
) -> dict[str, dict[str, Any]]:
    """Run it once; -> its events by name, reported with the seconds from its start."""
    began, seen = time.perf_counter(), dict[str, dict[str, Any]]()
    process = await asyncio.create_subprocess_exec(
        *(*interpreter, "-m", "fedtt", "client", "run", "--server", server.url, "--home", str(home)),
        *("--token", server.enrolment_token, "--data", str(data), "--runtime", runtime),
        *("--yes", "--once", "--json"),
        stdout=asyncio.subprocess.PIPE,
    )
    assert process.stdout is not None
    while line := await process.stdout.readline():
        event = json.loads(line)
        seen[event["event"]] = event
        report.line(at_s=round(time.perf_counter() - began, 1), **event)
    await process.wait()
    return seen


if __name__ == "__main__":
    main()
