"""A whole experiment whose devices train together."""

from __future__ import annotations

import json
from contextlib import closing
from pathlib import Path

import pytest

from edge_client.bundle import open_bundle
from export import ExportRequest, export_bundle
from fleet import fastest
from fleet.backends import OnnxBackend
from fleet.computed import Computed
from fleet.experiment import prepare
from fleet.fleet_file import read_fleet
from fleet.run import run_fleet
from fleet.run_files import Outcome, VersionLine
from tests.support.models import WORDS, save_tiny_model
from tests.support.requests import some_examples

pytestmark = pytest.mark.slow

FILE = """
bundle = "bundle"

[fleet]
devices = 12
seed = 4
trainer = "{trainer}"
model = "model"

[data]
train = "train.jsonl"

[task]
name = "words"

[task.rounds]
count = 4
cohort = 6
buffer = 4
deadline_s = 60
retry_s = 20

[task.training]
optimiser = "sgd"
learning_rate = 0.05
local_steps = 2
batch_size = 4

[task.codec]
quantise = "fp32"

[[profiles]]
name = "phone"
speed_spread = 0.5
dropout = 0.1
"""


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, its bundle with the lower block frozen, and examples."""
    directory = tmp_path_factory.mktemp("fleet")
    save_tiny_model(directory / "model")
    wanted = ExportRequest(
        model=str(directory / "model"),
        labels=("a", "b"),
        bottleneck=8,
        rank=2,
        depth=1,
        depths=(),
        max_tokens=32,
    )
    export_bundle(wanted, directory / "bundle", verify=False)
    rows = some_examples(open_bundle(directory / "bundle"), WORDS, 120, seed=0)
    lines = [json.dumps({"text": row.text, "label": row.label}) for row in rows]
    (directory / "train.jsonl").write_text("\n".join(lines))
    return directory


def _lived(directory: Path, trainer: str, name: str, until: int | None = None) -> Outcome:
    file = directory / f"{trainer}.toml"
    file.write_text(FILE.format(trainer=trainer))
    lines: list[VersionLine] = []
    return run_fleet(
        prepare(read_fleet(file)),
        directory / name,
        on_version=lines.append,
        stopped=lambda: until is not None and len(lines) > until,
    )


def test_a_batched_run_repeats_and_goes_on_to_the_same_bits(directory: Path) -> None:
    whole = _lived(directory, "batched-onnx", "whole")
    assert (whole.state, whole.versions) == ("finished", 4)
    assert _lived(directory, "batched-onnx", "again").sha256 == whole.sha256
    assert _lived(directory, "batched-onnx", "parts", until=2).state == "interrupted"
    assert _lived(directory, "batched-onnx", "parts").sha256 == whole.sha256


def test_a_run_goes_on_with_the_back_end_it_began_with(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fastest, "step_s", lambda backend, bundle: float(isinstance(backend, OnnxBackend)))
    assert _lived(directory, "batched", "chosen", until=1).state == "interrupted"
    monkeypatch.setattr(fastest, "step_s", lambda backend, bundle: pytest.fail("timed again"))
    assert _lived(directory, "batched", "chosen").state == "finished"
    with closing(Computed(directory / "chosen" / "computed.sqlite")) as computed:
        assert computed.trainer() == "batched-torch"


def test_a_batched_run_learns_what_one_by_one_learns(directory: Path) -> None:
    losses = {}
    for trainer in ("batched", "one-by-one"):
        outcome = _lived(directory, trainer, f"with-{trainer}")
        assert outcome.state == "finished"
        text = (directory / f"with-{trainer}" / "versions.jsonl").read_text()
        found = [json.loads(line)["train_loss_last"] for line in text.splitlines()]
        losses[trainer] = [loss for loss in found if loss is not None]
    assert losses["batched"] == pytest.approx(losses["one-by-one"], rel=1e-5)
    assert len(losses["batched"]) == 4
