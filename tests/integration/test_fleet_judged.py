"""Emulated devices that judge what others trained, in virtual time."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from edge_client.bundle import open_bundle
from fedtt.errors import ConfigError
from fleet.experiment import prepare
from fleet.fleet_file import read_fleet
from fleet.run import run_fleet
from tests.support.models import WORDS
from tests.support.requests import some_examples

FILE = """
bundle = "bundle"

[fleet]
devices = 8
seed = 4

[data]
train = "train.jsonl"

[task]
name = "words"

[task.rounds]
count = 3
cohort = 3
deadline_s = 60
retry_s = 20

[task.training]
optimiser = "sgd"
learning_rate = {rate}
local_steps = 2
batch_size = 4

[task.codec]
quantise = "fp32"

[task.evaluation]
by = "{by}"
devices = 3
bound = 0.2
deadline_s = 600
"""


def written(directory: Path, bundle: Path, *, rate: float = 0.05, by: str = "devices") -> Path:
    (directory / "bundle").symlink_to(bundle)
    rows = some_examples(open_bundle(bundle), WORDS, 80, seed=0)
    lines = [json.dumps({"text": row.text, "label": row.label}) for row in rows]
    (directory / "train.jsonl").write_text("\n".join(lines))
    path = directory / "fleet.toml"
    path.write_text(FILE.format(rate=rate, by=by))
    return path


def test_versions_are_judged_in_virtual_time_and_a_run_repeats_to_the_bit(
    tmp_path: Path, tiny_bundle: Path
) -> None:
    file = written(tmp_path, tiny_bundle)
    first, again = (run_fleet(prepare(read_fleet(file)), tmp_path / name) for name in ("first", "again"))
    assert (first.state, first.sha256) == ("finished", again.sha256)
    assert first.virtual_s == again.virtual_s


def test_a_fleet_that_diverges_has_its_versions_held_until_its_task_pauses(
    tmp_path: Path, tiny_bundle: Path
) -> None:
    file = written(tmp_path, tiny_bundle, rate=10.0)
    file.write_text(file.read_text().replace("retry_s = 20", "retry_s = 20\ngive_up_after = 1"))
    outcome = run_fleet(prepare(read_fleet(file)), tmp_path / "run")
    assert outcome.state == "paused"
    assert outcome.reason.startswith("1 versions in a row were held, the last because its loss rose")


def test_a_file_cannot_judge_what_an_emulated_server_makes(tmp_path: Path, tiny_bundle: Path) -> None:
    with pytest.raises(ConfigError, match="nobody stands beside an emulated server"):
        read_fleet(written(tmp_path, tiny_bundle, by="file"))
