"""Emulated devices against a server of its own process, over loopback HTTP and in real time."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from aggregator.admin_client import AdminClient
from edge_client.runtime import Runtimes
from fedtt.errors import ConfigError
from fleet.experiment import prepare
from fleet.federation import server_process
from fleet.fleet_file import read_fleet
from fleet.live import live_against
from fleet.pool import OneByOnePool
from fleet.report.record import read_run
from fleet.run_files import VersionLine
from tests.support.edge import MeanTarget, write_small_bundle

TASK = """
name = "lights"

[rounds]
count = 3
cohort = 4
deadline_s = 60
retry_s = 0.2

[training]
local_steps = 2
batch_size = 4
"""
FILE = """
bundle = "bundle"
task = "task.toml"

[fleet]
devices = 6
seed = 4

[data]
train = "train.jsonl"

[[profiles]]
name = "quick"
step_s = 0.01
latency_s = 0.001
"""


async def test_a_fleet_trains_the_task_of_a_running_server(tmp_path: Path) -> None:
    write_small_bundle(tmp_path / "bundle", base_bytes=10)
    rows = [{"text": f"lights {n}", "label": n % 2} for n in range(60)]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "task.toml").write_text(TASK)
    (tmp_path / "fleet.toml").write_text(FILE)
    experiment = prepare(read_fleet(tmp_path / "fleet.toml"))
    seen: list[VersionLine] = []
    async with server_process(tmp_path / "server") as server:
        async with AdminClient(server.admin_url, server.admin_token) as admin:
            await admin.create_task(TASK, await admin.send_bundle(tmp_path / "bundle"))
            outcome = await live_against(
                server.url,
                server.enrolment_token,
                experiment,
                tmp_path / "run",
                on_version=seen.append,
                pool=OneByOnePool(Runtimes(lambda bundle: MeanTarget())),
            )
            task = await admin.rows("/tasks/lights")
        left = (tmp_path / "run" / "versions.jsonl").read_text()
        with pytest.raises(ConfigError, match="--fresh writes over them"):
            await live_against(server.url, server.enrolment_token, experiment, tmp_path / "run")
        assert (tmp_path / "run" / "versions.jsonl").read_text() == left
        (tmp_path / "fleet.toml").write_text(FILE.replace("seed = 4", "seed = 5"))  # devices it does not know
        others = prepare(read_fleet(tmp_path / "fleet.toml"))
        refused = await live_against(server.url, "no token", others, tmp_path / "refused")
    assert (outcome.state, task["state"], task["version"]) == ("finished", "finished", 3)
    assert outcome.outcomes["acknowledged"] == 12
    assert outcome.left_out == {}
    assert (outcome.task, outcome.versions) == ("lights", 2)  # which the last round trained from
    assert [json.loads(line)["version"] for line in left.splitlines()] == [line.version for line in seen]
    assert [line.version for line in seen] == sorted({line.version for line in seen})
    assert seen[-1].sent_bytes > seen[0].sent_bytes
    assert read_run(tmp_path / "run").versions
    assert (refused.state, sum(refused.left_out.values())) == ("ended early", 6)
