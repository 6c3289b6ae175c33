"""Fleet files: what makes no sense is refused by name before anything starts."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from fedtt.errors import (
    ConfigError,
    DataError,
)
from fleet.experiment import prepare
from fleet.fleet_file import read_fleet
from tests.unit.fleet.conftest import FILE

Change = Callable[[str], str]
SAMPLING = '\n[task.sampling]\nstrategy = "uniform"\n'

REFUSED: dict[str, tuple[Change, str]] = {
    "an unknown section": (lambda t: t + "\n[nonsense]\n", "nonsense"),
    "an unknown setting": (lambda t: t.replace("devices = 20", "devices = 20\ndevises = 3"), "fleet.devises"),
    "no devices": (lambda t: t.replace("devices = 20", "devices = 0"), "fleet.devices"),
    "a cohort above the population": (lambda t: t.replace("cohort = 8", "cohort = 21"), "task.rounds.cohort"),
    "a bad task": (lambda t: t.replace("cohort = 8", "cohort = 0"), "rounds.cohort"),
    "no task": (lambda t: t.replace("[task", "[tusk"), "task"),
    "an unknown partition": (lambda t: t.replace('"dirichlet"', '"dirichlett"'), "data.partition.kind"),
    "a bad alpha": (lambda t: t.replace("alpha = 1.0", "alpha = -1.0"), "data.partition.alpha"),
    "an alpha that is a word": (lambda t: t.replace("alpha = 1.0", 'alpha = "x"'), "data.partition.alpha"),
    "more devices than rows": (lambda t: t.replace("devices = 20", "devices = 201"), "fleet.devices"),
    "more shards than devices": (
        lambda t: t.replace("[data]", "[data]\nshards = 21"),
        "data.shards",
    ),
    "a device left empty": (
        lambda t: t.replace("alpha = 1.0", "alpha = 0.01, least = 9"),
        "data.partition.alpha",
    ),
    "zero bandwidth": (lambda t: t.replace("up_bps = 1e5", "up_bps = 0"), "profiles.board.up_bps"),
    "zero bandwidth down": (lambda t: t.replace("up_bps = 1e5", "down_bps = 0"), "profiles.board.down_bps"),
    "no speed": (lambda t: t.replace("speed_spread = 0.5", "step_s = 0"), "profiles.phone.step_s"),
    "a kind with no device": (lambda t: t.replace("share = 3", "share = 3000"), "profiles.share"),
    "two kinds of one name": (lambda t: t.replace('"board"', '"phone"'), "profiles.name"),
    "certain dropout": (lambda t: t.replace("dropout = 0.2", "dropout = 1.0"), "profiles.phone.dropout"),
    "a bad fault": (lambda t: t.replace("corrupt = 0.05", "corrupt = 5"), "faults.corrupt"),
    "an unknown trainer": (lambda t: t.replace('"noop"', '"nope"'), "fleet.trainer"),
    "a batched trainer without a model": (lambda t: t.replace('"noop"', '"batched"'), "fleet.model"),
    "a model that lies nowhere": (
        lambda t: t.replace('"noop"', '"batched"\nmodel = "./nope"'),
        "fleet.model",
    ),
    "one in torch": (lambda t: t.replace('"noop"', '"batched-torch"'), "fleet.model"),
    "one without compiled graphs": (lambda t: t.replace('"noop"', '"batched-onnx"'), "fleet.model"),
    "more groups than devices": (
        lambda t: (
            t.replace("cohort = 8", "cohort = 21").replace("buffer = 6\n", "")
            + '\n[task.method]\nname = "hier-fedtt"\ngroups = 21\n'
        ),
        "task.method.groups",
    ),
    "a cap that its devices reach before the last round": (
        lambda t: t.replace("buffer = 6", "quorum = 7") + f"{SAMPLING}participation_cap = 2\n",  # 40 of 42
        "task.sampling.participation_cap",
    ),
    "a separation for which there are too few devices": (
        lambda t: t.replace("buffer = 6", "quorum = 7") + f"{SAMPLING}separation = 3\n",  # 21 of 20
        "task.sampling.separation",
    ),
    "too few devices with enough rows": (
        lambda t: t.replace("alpha = 1.0", "alpha = 1.0, least = 1").replace(
            'name = "lights"', 'name = "lights"\nmin_examples = 100'
        ),
        "fleet.devices",
    ),
    "too few devices with enough memory": (
        lambda t: (
            t.replace("up_bps", "memory_mb = 99\nup_bps")
            .replace("buffer = 6", "quorum = 8")
            .replace("share = 3", "share = 0.5")
            + "\n[task.budget]\nmemory_mb = 100\n"
        ),
        "fleet.devices",
    ),
    "limits that never hold": (
        lambda t: (
            t.replace("up_bps", 'network = "metered"\nlimits = { only_unmetered = true }\nup_bps')
            .replace("buffer = 6", "quorum = 8")
            .replace("share = 3", "share = 0.5")
            + '\n[conditions]\nkind = "daily"\n'
        ),
        "fleet.devices",
    ),
    "no trace": (
        lambda t: t + '\n[availability]\nkind = "trace"\nfile = "none.csv"\n',
        "availability.file",
    ),
    "a method that cannot train the bundle": (
        lambda t: t + '\n[task.method]\nname = "fedlora"\n',
        "task.method.name",
    ),
    "a night too long": (
        lambda t: t + '\n[availability]\nkind = "nightly"\nhours = 13.0\n',
        "availability.hours",
    ),
    "no TOML": (lambda t: t.replace("[fleet]", "[fleet"), "fleet.toml"),
}


@pytest.mark.parametrize(("change", "field"), REFUSED.values(), ids=REFUSED)
def test_what_makes_no_sense_is_refused_by_name_before_anything_starts(
    file: Path, change: Change, field: str
) -> None:
    file.write_text(change(FILE))
    with pytest.raises(ConfigError) as caught:
        prepare(read_fleet(file))
    assert caught.value.field.endswith(field)
    assert "\n" not in str(caught.value)


def test_a_row_with_a_label_the_model_does_not_know_is_named(file: Path) -> None:
    with (file.parent / "train.jsonl").open("a") as data:
        data.write('\n{"text": "lights", "label": "maybe"}\n')
    with pytest.raises(DataError, match=r"train\.jsonl row 201: .*'maybe'"):
        prepare(read_fleet(file))


def test_users_are_read_from_the_rows_and_missing_ones_named(file: Path) -> None:
    file.write_text(FILE.replace('kind = "dirichlet", alpha = 1.0', 'kind = "users"'))
    assert {shard.count() for shard in prepare(read_fleet(file)).shards} == {8}  # 200 rows of 25 users
    with (file.parent / "train.jsonl").open("a") as data:
        data.write('\n{"text": "lights", "label": 1}\n')
    with pytest.raises(DataError, match="example 201 has no 'user'"):
        prepare(read_fleet(file))


def test_a_task_may_be_a_file_of_its_own(file: Path) -> None:
    text = file.read_text()
    start, end = text.index("[task]"), text.index("[[profiles]]")
    task = text[start:end].replace("[task]\n", "").replace("[task.", "[")
    (file.parent / "task.toml").write_text(task)
    whole = read_fleet(file)
    file.write_text('task = "task.toml"\n' + text[:start] + text[end:])
    assert read_fleet(file) == whole


def test_an_experiment_that_was_moved_is_the_same_unless_it_trains_in_another_way(file: Path) -> None:
    (file.parent / "model").mkdir()
    file.write_text(FILE.replace('trainer = "noop"', 'model = "./model"'))
    moved = file.parent.with_name("moved")
    shutil.copytree(file.parent, moved)
    here, there = (prepare(read_fleet(place / file.name)) for place in (file.parent, moved))
    assert here.spec.fleet.model != there.spec.fleet.model
    assert here.fingerprint == there.fingerprint
    for other in ('trainer = "one-by-one"\nmodel = "./model"', "threads = 3\nmodel = './model'"):
        file.write_text(FILE.replace('trainer = "noop"', other))
        assert prepare(read_fleet(file)).fingerprint != here.fingerprint
