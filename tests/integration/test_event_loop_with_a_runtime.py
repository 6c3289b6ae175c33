"""A real client over a real bundle, with ONNX Runtime, holds up its app's loop no longer than it may."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from aggregator.app import device_app
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


async def lived(home: Path, url: str, how: str) -> dict[str, Any]:
    """One life until its update is acknowledged, downloads and all."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tests.support.beside_a_loop", str(home), url, how),
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


@pytest.mark.slow
async def test_a_prepared_client_imports_no_library_in_its_rounds_and_holds_up_no_loop(
    tmp_path: Path, tiny_bundle: Path
) -> None:
    async with (
        memory_service(tmp_path / "blobs", SPEC, tiny_bundle, SystemClock()) as service,
        listening(device_app(service)) as url,
    ):
        unprepared = await lived(tmp_path / "home-unprepared", url, "unprepared")
        found = [await lived(tmp_path / f"home-{n}", url, "prepared") for n in range(TRIES)]
    assert {name.split(".")[0] for name in unprepared["imported"]} >= {"onnxruntime", "tokenizers"}
    assert [each["imported"] for each in found] == [[]] * TRIES
    assert min(each["held_up_ms"] for each in found) < LAG_MS
