"""A real client over a real bundle, in each runtime, holds up its app's loop no longer than it may."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from aggregator.app import device_app
from edge_client.executorch_runtime import LIBRARY_VARIABLE
from fedtt.algorithms import FedAvg
from fedtt.seams import SystemClock
from fedtt.task import RoundSpec, TaskSpec, TrainingSpec
from tests.support.in_process import listening, memory_service

LAG_MS = 50
TRIES = 3  #: what a client does is done in each; what other programs do to it is not
SPEC = TaskSpec(
    name="loop",
    rounds=RoundSpec(count=1, cohort=TRIES + 1, deadline_s=1000),
    method=FedAvg(),
    training=TrainingSpec(local_steps=3, batch_size=4, depth=1),
)


async def lived(home: Path, url: str, runtime: str, how: str) -> dict[str, Any]:
    """One life until its update is acknowledged, downloads and all."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tests.support.beside_a_loop", str(home), url, runtime, how),
        stdout=asyncio.subprocess.PIPE,
    )
    try:
        async with asyncio.timeout(60):
            said, _ = await process.communicate()
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
    assert process.returncode == 0
    found: dict[str, Any] = json.loads(said)
    return found


async def check(home: Path, bundle: Path, runtime: str, libraries: set[str]) -> None:
    """libraries: that a client loads in its rounds where it is not prepared."""
    async with (
        memory_service(home / "blobs", SPEC, bundle, SystemClock()) as service,
        listening(device_app(service)) as url,
    ):
        unprepared = await lived(home / "unprepared", url, runtime, "unprepared")
        found = [await lived(home / f"prepared-{n}", url, runtime, "prepared") for n in range(TRIES)]
    assert {name.split(".")[0] for name in unprepared["loaded"]} >= libraries
    assert [each["loaded"] for each in found] == [[]] * TRIES
    assert min(each["held_up_ms"] for each in found) < LAG_MS


@pytest.mark.slow
async def test_a_prepared_client_loads_no_library_in_its_rounds_and_holds_up_no_loop(
    tmp_path: Path, tiny_bundle: Path
) -> None:
    await check(tmp_path, tiny_bundle, "onnxruntime", {"onnxruntime", "tokenizers"})


@pytest.mark.slow
async def test_nor_does_one_with_executorch(
    tmp_path: Path, executorch_bundle: Path, executorch_library: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(LIBRARY_VARIABLE, str(executorch_library))
    await check(
        tmp_path, executorch_bundle, "executorch", {"libfedtt_executorch", "libexecutorch", "tokenizers"}
    )
