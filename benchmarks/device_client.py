"""The most memory of a whole client: it enrols, downloads a bundle, trains two blocks, gets its receipt."""

from __future__ import annotations

import asyncio
import json
import statistics
import sys
import tempfile
from pathlib import Path

import numpy as np

from benchmarks.device_processes import WORDS
from benchmarks.harness import Report
from edge_client.bundle import RuntimeName, open_bundle
from fleet.federation import Server, server_process

__all__ = ["client_peak_mb"]

_TOKENS, _BATCH = 64, 8
_TASK = f"""
name = "peak"
[rounds]
count = 1
cohort = 1
[training]
depth = 2
local_steps = 10
batch_size = {_BATCH}
[codec]
quantise = "int4"
error_feedback = true
"""


def client_peak_mb(
    report: Report, bundle: Path, base: str, runtime: RuntimeName, seed: int, runs: int
) -> float:
    """Resident memory at its most (VmHWM) of a `fedtt client run` process, in 10^6 bytes: the median of runs.

    They differ by a megabyte, by where threads meet.
    """
    found = [asyncio.run(_peak_mb(bundle, runtime, seed)) for _ in range(runs)]
    peak_mb = statistics.median(found)
    report.line(part="client", runtime=runtime, base=base, peak_mb=peak_mb, runs_mb=found)
    return peak_mb


async def _peak_mb(bundle: Path, runtime: RuntimeName, seed: int) -> float:
    from aggregator.admin_client import AdminClient

    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        _write_examples(directory / "examples.jsonl", bundle, runtime, seed)
        async with server_process(directory / "server") as server:
            async with AdminClient(server.admin_url, server.admin_token) as admin:
                await admin.create_task(_TASK, await admin.send_bundle(bundle))
            return await _trained(server, directory, runtime)


def _write_examples(path: Path, bundle: Path, runtime: RuntimeName, seed: int) -> None:
    """Two batches of texts that fill their tokens, but for the two that mark their ends."""
    labels, words = open_bundle(bundle, runtime).manifest.labels, WORDS.split()
    rng = np.random.default_rng(seed)
    with path.open("w") as file:
        for number in range(2 * _BATCH):
            text = " ".join(rng.choice(words, _TOKENS - 2))
            file.write(json.dumps({"text": text, "label": labels[number % len(labels)]}) + "\n")


async def _trained(server: Server, directory: Path, runtime: RuntimeName) -> float:
    """Raises RuntimeError where its update is not acknowledged."""
    served = ("--server", server.url, "--token", server.enrolment_token, "--runtime", runtime)
    files = ("--data", str(directory / "examples.jsonl"), "--home", str(directory / "home"))
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "fedtt", "client", "run", *served, *files, "--yes", "--json"),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
    )
    assert process.stdout is not None
    try:
        async for line in process.stdout:
            event = json.loads(line)
            if event["event"] == "acknowledged":
                return _most_mb(process.pid)
            if event["event"] in {"gave_up", "dropped", "retired"}:
                break
    finally:
        process.terminate()
        await process.wait()
    raise RuntimeError(f"the client's update was not acknowledged: {event}")


def _most_mb(pid: int) -> float:
    status = Path(f"/proc/{pid}/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024 / 1e6
