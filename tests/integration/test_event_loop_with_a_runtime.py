"""A real client over a real bundle, in each runtime, and how long it holds up its app's loop.

Of a prepared client with a small vocabulary the least of a few lives counts: what it does itself it does in
each.
A tokenizer of 256,000 words holds the loop up when it is read there, and not when it was read before.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from msgspec import structs

from aggregator.app import device_app
from edge_client.executorch_runtime import LIBRARY_VARIABLE
from edge_client.files import file_digest
from fedtt.algorithms import FedAvg
from fedtt.manifest import MANIFEST, FileEntry, decode_manifest, encode_manifest
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


def with_words(bundle: Path, directory: Path, count: int) -> Path:
    """The same bundle with so many more words in its tokenizer, which no text has."""
    shutil.copytree(bundle, directory)
    path, manifest = directory / "tokenizer.json", directory / MANIFEST
    tokenizer = json.loads(path.read_text())
    known = tokenizer["model"]["vocab"]
    known |= {f"no-text-{number:x}": len(known) + number for number in range(count)}
    path.write_text(json.dumps(tokenizer))
    described = decode_manifest(manifest.read_bytes())
    entry = FileEntry(file_digest(path), path.stat().st_size)
    manifest.write_bytes(
        encode_manifest(structs.replace(described, files=described.files | {path.name: entry}))
    )
    return directory


@pytest.mark.slow
async def test_a_tokenizer_of_many_words_holds_up_the_loop_unless_it_was_read_before(
    tmp_path: Path, tiny_bundle: Path
) -> None:
    bundle = with_words(tiny_bundle, tmp_path / "bundle", 256_000)
    async with (
        memory_service(tmp_path / "blobs", SPEC, bundle, SystemClock()) as service,
        listening(device_app(service)) as url,
    ):
        unread = await lived(tmp_path / "unread", url, "onnxruntime", "prepared")
        found = [await lived(tmp_path / f"read-{n}", url, "onnxruntime", str(bundle)) for n in range(TRIES)]
    assert unread["held_up_ms"] > LAG_MS
    assert min(each["held_up_ms"] for each in found) < LAG_MS


async def check(home: Path, bundle: Path, runtime: str, libraries: set[str]) -> None:
    """libraries: that a client loads, from its trainer on, where it is not prepared."""
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
async def test_a_prepared_client_with_a_small_vocabulary_loads_no_library_in_its_rounds_and_holds_up_no_loop(
    tmp_path: Path, tiny_bundle: Path
) -> None:
    await check(tmp_path, tiny_bundle, "onnxruntime", {"onnxruntime", "tokenizers"})


@pytest.mark.slow
async def test_nor_does_one_with_executorch(
    tmp_path: Path, executorch_bundle: Path, executorch_library: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(LIBRARY_VARIABLE, str(executorch_library))
    await check(tmp_path, executorch_bundle, "executorch", {"libfedtt_executorch", "tokenizers"})
