"""`fleet.bound`: devices that each train by themselves, and all data in one place, on a small real model."""

from __future__ import annotations

import json
import signal
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from edge_client.bundle import open_bundle
from edge_client.examples import Shard
from edge_client.inference import Model
from edge_client.onnx_runtime import OnnxRuntime, onnx_runtimes
from fedtt.cli import main
from fedtt.errors import ConfigError
from fedtt.version_config import CONFIG, FACTORS
from fedtt.wire import encode_theta, version_digest
from fleet.bounds import trained_alone
from fleet.experiment import Experiment, prepare
from fleet.fleet_file import read_fleet
from fleet.pool import OneByOnePool
from fleet.run import run_fleet
from fleet.run_files import Outcome

FILE = """
bundle = "{bundle}"

[fleet]
devices = 3
bound = "{bound}"

[data]
train = "train.jsonl"
shards = 2
partition = {{ kind = "labels", labels_each = 2 }}

[evaluation]
data = "test.jsonl"
per_device = 2

[task]
name = "words"
[task.rounds]
count = 20
cohort = 3
[task.method]
name = "fedavg"
[task.training]
learning_rate = 3e-2
local_steps = 3
batch_size = 4
proximal = 1000.0
"""
WORDS = {"alarm": "wake me at seven", "lights off": "dark please", "pay": "send ten", "weather": "rain today"}

pytestmark = pytest.mark.slow


@pytest.fixture
def place(tmp_path: Path, tiny_bundle: Path) -> Path:
    """A directory with data; `written` puts a fleet file beside them."""
    rows = [{"text": text, "label": label} for label, text in WORDS.items()] * 2
    for name in ("train", "test"):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "bundle").symlink_to(tiny_bundle)
    return tmp_path


def written(place: Path, bound: str, **changes: str) -> Path:
    text = FILE.format(bundle="bundle", bound=bound)
    for old, new in changes.items():
        assert f"{old} = " in text
        text = "\n".join(
            f"{old} = {new}" if line.startswith(f"{old} =") else line for line in text.split("\n")
        )
    (place / "fleet.toml").write_text(text)
    return place / "fleet.toml"


def lived(place: Path, file: Path, name: str = "run", until: int | None = None) -> tuple[Experiment, Outcome]:
    experiment, asked = prepare(read_fleet(file)), 0

    def stopped() -> bool:
        nonlocal asked
        asked += 1
        return until is not None and asked > until

    return experiment, run_fleet(experiment, place / name, stopped=stopped)


def lines(place: Path, name: str, run: str = "run") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (place / run / name).read_text().splitlines()]


def test_every_device_trains_by_itself_and_nothing_is_sent(place: Path) -> None:
    experiment, outcome = lived(place, written(place, "local-only"))
    assert (outcome.state, outcome.steps) == (
        "finished",
        2 * 60,
    )  # two shards, 20 · 3 · 3 steps over 3 devices
    assert outcome.sent_bytes == outcome.received_bytes == outcome.took_part == 0
    bundle, pool = experiment.bundle, OneByOnePool(onnx_runtimes(1))
    thetas = list(trained_alone(bundle, experiment.spec.task, experiment.shards, pool, steps=60))
    test, runtime = experiment.evaluation, OnnxRuntime(bundle)
    assert test is not None
    alone = [Model(bundle, theta, runtime).evaluate(test) for theta in thetas]
    devices = lines(place, "devices.jsonl")
    assert [device["device"] for device in devices] == [0, 1, 2]
    for device in devices:
        expected = alone[device["shard"]]
        assert device["alone_accuracy"] == expected.accuracy == 0.5  # the two labels it has seen
        assert device["alone_loss"] == pytest.approx(expected.loss)
    own = [device["accuracy"] for device in devices if device["examples"]]
    assert own == [1.0, 1.0]  # on its own rows, of the two devices that were drawn
    assert outcome.accuracy == 0.5
    assert outcome.loss == pytest.approx(statistics.fmean(device["alone_loss"] for device in devices))
    first, last = lines(place, "versions.jsonl")
    assert (first["version"], last["version"]) == (0, 20)
    assert last["report"] == {"worst_device": 0.5, "best_device": 0.5}
    assert not (place / "run" / "result").exists()


def test_all_rows_in_one_place_make_one_model_with_the_steps_of_all(place: Path) -> None:
    experiment, outcome = lived(place, written(place, "centralised"))
    assert (outcome.steps, outcome.accuracy) == (180, 1.0)
    rows = [example for shard in experiment.shards for example in shard.read()]
    pool = OneByOnePool(onnx_runtimes(1))
    (theta,) = trained_alone(experiment.bundle, experiment.spec.task, [Shard(rows)], pool, steps=180)
    assert outcome.sha256 == version_digest(encode_theta(theta))
    assert {path.name for path in (place / "run" / "result").iterdir()} == {CONFIG, FACTORS}
    assert lines(place, "devices.jsonl") == []


def test_the_result_is_read_as_any_version_is(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lived(place, written(place, "centralised"))
    result, bundle = str(place / "run" / "result"), str(open_bundle(place / "bundle").directory)
    assert main(["evaluate", result, str(place / "test.jsonl"), "--bundle", bundle, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["accuracy"] == 1.0


@pytest.fixture
def own_signals() -> Iterator[None]:
    """Handlers as they were, once a command has set its own."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("own_signals")
def test_people_are_told_what_each_came_to(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = written(place, "local-only")
    assert main(["fleet", "run", str(file), "--dir", str(place / "run")]) == 0
    said = capsys.readouterr().out
    assert "task words finished, accuracy 50.0% in " in said
    assert "because each device trained by itself, for 60 steps" in said
    assert "took part" not in said
    assert "single devices" in (place / "run" / "report.html").read_text()


def test_a_run_that_was_cut_short_goes_on_to_the_same_lines(place: Path) -> None:
    file = written(place, "local-only")
    _, cut = lived(place, file, until=1)
    assert cut.state == "interrupted"
    assert not (place / "run" / "devices.jsonl").exists()
    _, parts = lived(place, file)
    found = lines(place, "devices.jsonl")
    _, whole = lived(place, file, "whole")
    assert parts.loss == whole.loss
    assert found == [
        json.loads(line) for line in (place / "whole" / "devices.jsonl").read_text().splitlines()
    ]


@pytest.mark.parametrize(
    ("bound", "changes", "complaint"),
    [
        ("alone", {}, r"fleet\.bound = 'alone' .*Invalid enum value"),
        ("centralised", {"count": "100000"}, r"task\.rounds\.count = 100000 .*1 to 100000 steps, not 900000"),
        ("local-only", {"count": "1", "cohort": "1", "local_steps": "2"}, r"rounds\.count = 1 .*not 0"),
    ],
)
def test_what_makes_no_sense_is_refused(
    place: Path, bound: str, changes: dict[str, str], complaint: str
) -> None:
    with pytest.raises(ConfigError, match=complaint):
        read_fleet(written(place, bound, **changes))


@pytest.mark.usefixtures("own_signals")
def test_noise_of_devices_and_a_server_elsewhere_are_refused(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = written(place, "local-only")
    assert main(["fleet", "run", str(file), "--server", "http://127.0.0.1:1", "--token", "t"]) == 2
    assert "fleet.bound" in capsys.readouterr().err
    file.write_text(file.read_text() + "[task.privacy]\nclip = 1.0\nnoise_multiplier = 1.0\n")
    with pytest.raises(ConfigError, match=r"fleet\.bound = 'local-only' .*none with \[task\.privacy\]"):
        read_fleet(file)
