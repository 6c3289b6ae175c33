"""`fedtt judge` and the operators' words on versions, against a real server and a real model."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import pytest_asyncio
from msgspec.structs import replace

from aggregator.metrics import totals
from edge_client import events
from edge_client.bundle import open_bundle
from edge_client.device_config import DeviceConfig
from edge_client.example_files import read_examples
from edge_client.examples import ExampleStore
from edge_client.session import open_device
from fedtt.cli import main
from fedtt.manifest import MANIFEST, decode_manifest, encode_manifest
from fedtt.messages import Code, Wait
from tests.support.edge import write_small_bundle
from tests.support.served import CHECK_IN, Peer, Served, frame_of, refused, served, task_text, until

EVALUATION = '\n[evaluation]\nby = "file"\nbound = 0.05\n'


@pytest_asyncio.fixture
async def server(tmp_path: Path, tiny_bundle: Path) -> AsyncIterator[Served]:
    async with served(tmp_path) as server:
        digest = await server.admin.send_bundle(tiny_bundle)
        await server.admin.create_task(task_text(cohort=1, count=9) + EVALUATION, digest)
        yield server


@pytest.fixture
def test_rows(tmp_path: Path, tiny_bundle: Path) -> Path:
    labels = open_bundle(tiny_bundle).manifest.labels
    rows = [{"text": f"please {label}", "label": label} for label in labels for _ in range(3)]
    path = tmp_path / "test.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


async def fold(server: Served, peer: Peer, bundle: Path, size: float) -> None:
    """One device moves every number at random, and its update makes the next version."""
    layout = open_bundle(bundle).manifest.adapter.layout
    work = await peer.work()
    before = len(await server.admin.task("lights", "/versions"))
    delta = np.random.default_rng(1).normal(0, size, layout.size).astype(np.float32)
    await peer.transport.upload(work.lease, frame_of(work.plan, delta, factors=layout))

    async def folded() -> bool:
        return len(await server.admin.task("lights", "/versions")) > before

    await until(folded)


async def command(server: Served, tmp_path: Path, *arguments: str) -> int:
    where = ("--server", server.listening.admin_url, "--token-file", str(tmp_path / "data" / "admin-token"))
    return await asyncio.to_thread(main, [*arguments, *where])


async def changes(server: Served) -> list[tuple[str, int]]:
    """What the log says was done to versions of the task, and which."""
    entries = json.loads((await server.people("GET", "/audit")).body)
    found = [entry for entry in entries if entry["action"].startswith("version.")]
    assert {(entry["actor"], entry["subject"]) for entry in found} <= {("owner", "lights")}
    return [
        (entry["action"].removeprefix("version."), json.loads(entry["detail"])["number"]) for entry in found
    ]


async def test_a_version_that_ruins_the_model_is_held_and_a_harmless_one_is_released(
    server: Served, tiny_bundle: Path, tmp_path: Path, test_rows: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    judge = ("judge", "lights", "--data", str(test_rows), "--once", "--json")
    async with server.device() as peer:
        await fold(server, peer, tiny_bundle, 1e-4)
        assert isinstance(await peer.transport.check_in(CHECK_IN), Wait)
        assert await command(server, tmp_path, *judge) == 0
        harmless = json.loads(capsys.readouterr().out)
        assert (harmless["number"], harmless["state"]) == (1, "released")
        assert harmless["report"]["judged_examples"] == 12
        assert abs(harmless["report"]["judged_loss"] - harmless["report"]["judged_loss_before"]) < 0.05
        await fold(server, peer, tiny_bundle, 30.0)
        assert await command(server, tmp_path, *judge) == 0
        ruined = json.loads(capsys.readouterr().out)
        assert (ruined["number"], ruined["state"]) == (2, "held")
        assert ruined["reason"].startswith("its loss rose by")
        assert await changes(server) == [("judge", 1), ("judge", 2)]
        assert totals(server.service.metrics.versions_decided, "state") == {"released": 1, "held": 1}
        work = await peer.work()
    assert work.plan.version_number == 3
    assert work.plan.version == harmless["sha256"]


async def test_operators_settle_a_candidate_and_bring_a_version_back(
    server: Served, tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    async with server.device() as peer:
        await fold(server, peer, tiny_bundle, 1e-4)
        assert await command(server, tmp_path, "version", "release", "lights", "1", "--json") == 0
        assert json.loads(capsys.readouterr().out)["state"] == "released"
        await fold(server, peer, tiny_bundle, 1e-4)
        assert await command(server, tmp_path, "version", "hold", "lights", "2", "--json") == 0
        assert json.loads(capsys.readouterr().out)["reason"] == "an operator held it"
        assert await command(server, tmp_path, "version", "rollback", "lights", "0", "--json") == 0
        again = json.loads(capsys.readouterr().out)
        assert (again["number"], again["reason"]) == (4, "an operator brought version 0 back")
        assert await changes(server) == [("release", 1), ("hold", 2), ("rollback", 0)]
        assert (await peer.work()).plan.version == again["sha256"]
        assert (
            await command(server, tmp_path, "version", "download", "lights", "--out", str(tmp_path / "v"))
            == 0
        )
        assert "version 4 of lights" in capsys.readouterr().out


async def test_verdicts_of_nonsense_are_refused_and_settle_nothing(
    server: Served, tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], test_rows: Path
) -> None:
    async with server.device() as peer:
        await fold(server, peer, tiny_bundle, 1e-4)
    path = "/tasks/lights/versions/1/verdict"
    for body, words in {
        b"{}": "missing required field",
        b'{"examples":1,"before":{"loss":-1},"after":{"loss":1}}': "loss",
        b'{"examples":1,"before":{"loss":1,"right":2},"after":{"loss":1}}': "at most examples = 1",
        b"[" * 999: "Expected `object`",
    }.items():
        refused(await server.people("POST", path, body), Code.MALFORMED, words)
    good = b'{"examples":1,"before":{"loss":1},"after":{"loss":1}}'
    refused(
        await server.people("POST", path.replace("/1/", "/7/"), good), Code.NOT_FOUND, "there is no version 7"
    )
    refused(
        await server.people("POST", path.replace("/1/", "/0/"), good), Code.CONFLICT, "is released already"
    )
    states = [version["state"] for version in await server.admin.task("lights", "/versions")]
    assert states == ["released", "candidate"]
    assert await changes(server) == []
    assert await command(server, tmp_path, "judge", "lights", "--data", "no-such-file") == 2
    assert capsys.readouterr().err.startswith("fedtt: error: no-such-file")


async def test_a_task_that_goes_by_accuracy_is_refused_where_no_verdict_can_have_one(
    server: Served, tmp_path: Path
) -> None:
    directory = tmp_path / "language"
    write_small_bundle(directory)
    manifest = replace(decode_manifest((directory / MANIFEST).read_bytes()), task="causal-lm")
    (directory / MANIFEST).write_bytes(encode_manifest(manifest))
    digest = await server.admin.send_bundle(directory)
    text = task_text("language") + '\n[evaluation]\nmeasure = "accuracy"\n'
    answer = await server.people("POST", f"/tasks?bundle={digest}", text.encode())
    refused(answer, Code.MALFORMED, "evaluation.measure = 'accuracy' is not allowed", "'loss' with a bundle")


async def test_a_real_device_judges_a_version_on_its_own_examples(
    tmp_path: Path, tiny_bundle: Path, test_rows: Path
) -> None:
    text = task_text("judged", cohort=1, count=9) + "\n[evaluation]\ndevices = 1\nbound = 0.05\n"
    async with served(tmp_path) as server, server.device() as peer:
        await server.admin.create_task(text, await server.admin.send_bundle(tiny_bundle))
        layout = open_bundle(tiny_bundle).manifest.adapter.layout
        work = await peer.work()
        delta = np.full(layout.size, 30.0, np.float32)
        await peer.transport.upload(work.lease, frame_of(work.plan, delta, factors=layout))
        with closing(ExampleStore(tmp_path / "examples.db")) as examples:
            examples.replace_file("rows", read_examples(test_rows))
            config = DeviceConfig(token=server.token)
            async with open_device(
                tmp_path / "home", server=server.url, examples=examples, config=config
            ) as device:
                await device.consent()
                step = await device.run(lambda step: isinstance(step, events.Judged))
        assert isinstance(step, events.Judged)
        assert (step.task, step.version_number, step.examples) == ("judged", 1, 12)
        assert step.loss > step.loss_before + 0.05

        async def settled() -> list[str]:
            states = [version["state"] for version in await server.admin.task("judged", "/versions")]
            return states if "candidate" not in states else []

        assert await until(settled) == ["released", "held", "released"]
