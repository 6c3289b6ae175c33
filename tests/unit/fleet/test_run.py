"""Experiments from a file to their results: checked first, killed and gone on with, the same every time."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from edge_client.runtime import Runtimes
from fedtt.errors import (
    BundleError,
    ConfigError,
    FedttError,
    LayoutError,
    StorageError,
    Unreachable,
    WireError,
)
from fedtt.version_config import CONFIG, FACTORS
from fleet.experiment import prepare
from fleet.fleet_file import read_fleet
from fleet.live import live_against
from fleet.pool import OneByOnePool, Pool
from fleet.run import run_fleet
from fleet.run_files import Outcome, VersionLine
from tests.support.edge import MeanTarget
from tests.support.lying_factors import LIES, with_first_factors
from tests.unit.fleet.conftest import FILE


def lived(
    file: Path,
    name: str,
    *,
    until: int | None = None,
    fresh: bool = False,
    seen: list[VersionLine] | None = None,
) -> Outcome:
    """Live the experiment with real training, perhaps only until a version has appeared."""
    lines: list[VersionLine] = [] if seen is None else seen
    return run_fleet(
        prepare(read_fleet(file)),
        file.parent / name,
        fresh=fresh,
        pool=OneByOnePool(Runtimes(lambda bundle: MeanTarget())),
        on_version=lines.append,
        stopped=lambda: until is not None and len(lines) > until,
    )


def rows(file: Path, name: str) -> list[object]:
    """A run's lines, but for the time on the wall."""
    found = [json.loads(line) for line in (file.parent / name / "versions.jsonl").read_text().splitlines()]
    lines: list[object] = [{key: value for key, value in row.items() if key != "wall_s"} for row in found]
    return lines + (file.parent / name / "participations.jsonl").read_text().splitlines()


def test_a_run_leaves_its_results_in_its_directory(file: Path) -> None:
    outcome = lived(file, "run")
    assert (outcome.state, outcome.versions) == ("finished", 6)
    directory = file.parent / "run"
    assert json.loads((directory / "summary.json").read_text())["sha256"] == outcome.sha256
    assert {path.name for path in (directory / "result").iterdir()} == {CONFIG, FACTORS}
    columns, *work = [
        json.loads(line) for line in (directory / "participations.jsonl").read_text().splitlines()
    ]
    assert all(len(row) == len(columns) for row in work)
    devices = [json.loads(line) for line in (directory / "devices.jsonl").read_text().splitlines()]
    assert sum(device["sent_bytes"] for device in devices) == outcome.sent_bytes
    assert sum(device["participations"] for device in devices) == outcome.outcomes["acknowledged"]


@pytest.mark.parametrize("until", [0, 1, 4])
def test_a_run_that_was_cut_short_goes_on_to_the_same_bits_and_lines(file: Path, until: int) -> None:
    whole = lived(file, "whole")
    assert lived(file, "parts", until=until).state == "interrupted"
    parts = lived(file, "parts")
    assert parts.sha256 == whole.sha256
    assert rows(file, "parts") == rows(file, "whole")


def test_one_experiment_is_lived_again_and_gone_on_with_as_if_it_were_read_anew(file: Path) -> None:
    """A run leaves nothing in what it was made from: its devices are as new to the next."""
    whole, experiment, lines = lived(file, "whole"), prepare(read_fleet(file)), list[VersionLine]()

    def lived_again(name: str, *, until: int | None = None) -> Outcome:
        lines.clear()
        return run_fleet(
            experiment,
            file.parent / name,
            pool=OneByOnePool(Runtimes(lambda bundle: MeanTarget())),
            on_version=lines.append,
            stopped=lambda: until is not None and len(lines) > until,
        )

    assert lived_again("parts", until=2).state == "interrupted"
    for name in ("parts", "again"):
        assert lived_again(name).sha256 == whole.sha256
        assert rows(file, name) == rows(file, "whole")


def test_going_on_trains_nothing_twice(file: Path) -> None:
    lived(file, "run")
    trained: list[object] = []

    def load(bundle: object) -> MeanTarget:
        trained.append(bundle)
        return MeanTarget()

    run_fleet(prepare(read_fleet(file)), file.parent / "run", pool=OneByOnePool(Runtimes(load)))
    assert trained == []


def test_a_killed_process_goes_on_to_the_same_bits(file: Path) -> None:
    file.write_text(FILE.replace("count = 6", "count = 60"))
    command = [sys.executable, "-m", "fedtt", "fleet", "run", str(file), "--json", "--dir"]

    def run(name: str) -> dict[str, object]:
        done = subprocess.run([*command, str(file.parent / name)], capture_output=True, check=True, text=True)
        last: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
        return last

    with subprocess.Popen(
        [*command, str(file.parent / "killed")], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        for _ in range(20):
            process.stdout.readline()
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    killed, whole = run("killed"), run("whole")
    assert (killed["state"], killed["versions"]) == ("finished", 60)
    assert killed["sha256"] == whole["sha256"]


def test_ctrl_c_ends_in_order_and_says_how_to_go_on(file: Path) -> None:
    file.write_text(FILE.replace("count = 6", "count = 100000"))
    command = [sys.executable, "-m", "fedtt", "fleet", "run", str(file), "--dir", str(file.parent / "run")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        versions = file.parent / "run" / "versions.jsonl"
        while not versions.exists() or versions.stat().st_size < 10_000:
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        out, err = process.communicate()
    assert process.returncode == 130
    assert f"fedtt fleet run {file} --dir {file.parent / 'run'}" in out
    assert err == ""


def test_a_directory_of_another_run_is_refused_until_it_may_be_forgotten(file: Path) -> None:
    lived(file, "run")
    file.write_text(FILE.replace("seed = 4", "seed = 5"))
    with pytest.raises(ConfigError, match="--fresh begins anew"):
        lived(file, "run")
    assert lived(file, "run", fresh=True).state == "finished"


def test_a_start_whose_pool_did_not_open_leaves_the_directory_to_the_corrected_command(file: Path) -> None:
    def fails(name: str) -> tuple[str, Pool]:
        raise Unreachable("there is no cluster")

    directory = file.parent / "run"
    with pytest.raises(Unreachable):
        run_fleet(prepare(read_fleet(file)), directory, opener=fails)
    file.write_text(FILE.replace("seed = 4", "seed = 5").replace('"noop"', '"one-by-one"'))
    asked: list[str] = []

    def opener(name: str) -> tuple[str, Pool]:
        asked.append(name)
        return name, OneByOnePool(Runtimes(lambda bundle: MeanTarget()))

    corrected = prepare(read_fleet(file))
    assert run_fleet(corrected, directory, opener=opener).state == "finished"
    assert asked == ["one-by-one"]
    assert run_fleet(corrected, directory, opener=opener).state == "finished"  # it is this run's own now


@pytest.mark.skipif(find_spec("ray") is None, reason="SKIPPED: Ray is not installed: pip install '.[ray]'")
def test_a_cluster_that_is_not_there_keeps_no_run_from_its_directory(file: Path) -> None:
    status, line, _ = refusal_of_command(file, "--ray", "--ray-address", "auto")
    assert status not in (0, 130)
    assert line.startswith("fedtt: error: this machine is part of no Ray cluster")
    assert lived(file, "run").state == "finished"


@pytest.mark.parametrize("data", [*LIES, pytest.param(None, id="none")])
def test_a_bundle_without_sound_first_factors_is_refused_before_anything_starts(
    file: Path, data: bytes | None
) -> None:
    bundle = file.parent / "bundle"
    if data is None:
        (bundle / FACTORS).unlink()
    else:
        with_first_factors(bundle, data)
    with pytest.raises((BundleError, LayoutError), match=r"factors\.safetensors.* export"):
        prepare(read_fleet(file))


def test_a_pool_is_opened_when_all_else_is_in_order_and_by_the_name_it_was_opened_by_first(
    file: Path,
) -> None:
    """Ray's is, whose workers take a while to start, and whose back end a timing chose."""
    asked: list[str] = []

    def opener(name: str) -> tuple[str, Pool]:
        asked.append(name)
        return "chosen", OneByOnePool(Runtimes(lambda bundle: MeanTarget()))

    directory = file.parent / "run"
    for _ in range(2):
        assert run_fleet(prepare(read_fleet(file)), directory, opener=opener).state == "finished"
    assert asked == ["noop", "chosen"]
    file.write_text(FILE.replace("seed = 4", "seed = 5"))
    other = prepare(read_fleet(file))
    with pytest.raises(ConfigError, match="--fresh begins anew"):
        run_fleet(other, directory, opener=opener)
    with pytest.raises(FedttError, match="did not answer"):
        asyncio.run(live_against("http://127.0.0.1:1", "token", other, file.parent / "live", opener=opener))
    assert len(asked) == 2


def test_results_that_nobody_can_go_on_with_are_not_written_over_unasked(file: Path) -> None:
    lived(file, "run")
    (file.parent / "run" / "computed.sqlite").unlink()
    before = rows(file, "run")
    with pytest.raises(ConfigError, match="--fresh writes over them"):
        lived(file, "run")
    assert rows(file, "run") == before
    assert lived(file, "run", fresh=True).state == "finished"


def test_two_runs_do_not_share_a_directory_whichever_server_they_are_of(file: Path) -> None:
    refused: list[FedttError] = []
    experiment, directory = prepare(read_fleet(file)), file.parent / "run"
    others: list[Callable[[], object]] = [
        lambda: lived(file, "run"),
        lambda: asyncio.run(live_against("http://127.0.0.1:1", "token", experiment, directory)),
    ]

    def look(line: VersionLine) -> None:
        if line.version == 1:
            for other in others:
                with pytest.raises(StorageError, match="another run is under way") as caught:
                    other()
                refused.append(caught.value)

    run_fleet(experiment, directory, on_version=look)
    assert len(refused) == len(others)


def refusal_of_command(file: Path, *options: str) -> tuple[int, str, str]:
    """Status, what it said as its one error, and what lies in its directory."""
    command = [sys.executable, "-m", "fedtt", "fleet", "run", str(file), "--dir", "run", *options]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        cwd=file.parent,
        timeout=60,
        stdin=subprocess.DEVNULL,
    )
    (line,) = done.stderr.splitlines()
    return done.returncode, line, done.stdout


@pytest.mark.parametrize(
    ("more", "field"),
    [
        ('[task.method]\nname = "fedlora"', "task.method.name = 'fedlora'"),
        ('[availability]\nkind = "trace"\nfile = "none.csv"', "availability.file = "),
    ],
)
def test_what_only_the_bundle_or_another_file_shows_is_refused_with_the_fleet_files_name(
    file: Path, more: str, field: str
) -> None:
    file.write_text(f"{FILE}\n{more}\n")
    status, said, out = refusal_of_command(file)
    assert (status, out) == (2, "")
    assert said.startswith(f"fedtt: error: {file}: {field}")


def test_a_server_that_is_not_there_is_said_at_once(file: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and does not listen
        server = f"http://127.0.0.1:{taken.getsockname()[1]}"
        status, said, out = refusal_of_command(file, "--server", server, "--token", "token")
    assert status not in (0, 130)
    assert said.startswith(f"fedtt: error: {server}")
    assert "did not answer (Connection refused): check the address" in said
    assert out == ""
    assert not list((file.parent / "run").glob("*.jsonl"))


async def test_a_server_that_is_another_is_said_at_once(file: Path) -> None:
    experiment = prepare(read_fleet(file))
    for answers in (web.Response(status=404, text="nothing here"), web.Response(text="hello")):
        app = web.Application()
        app.router.add_get("/healthz", partial(_always, answers))
        async with TestServer(app) as other:
            with pytest.raises(WireError, match="is this the aggregator's address"):
                await live_against(str(other.make_url("/")), "token", experiment, file.parent / "run")


async def _always(response: web.Response, request: web.Request) -> web.Response:
    return response


@pytest.mark.parametrize(
    ("address", "said"),
    [
        (
            "nonsense",
            "fedtt: error: --ray-address = 'nonsense' is not allowed: HOST:PORT of the cluster's head",
        ),
        ("127.0.0.1:1", "fedtt: error: there is no Ray at 127.0.0.1:1"),
    ],
)
def test_a_cluster_that_is_not_there_is_said_before_anything_starts(
    file: Path, address: str, said: str
) -> None:
    status, line, out = refusal_of_command(file, "--ray", "--ray-address", address)
    assert status not in (0, 130)
    assert line.startswith(said)
    assert out == ""
    assert not (file.parent / "run").exists()


def test_devices_that_train_and_lose_leases_on_the_way_are_not_left_out(file: Path) -> None:
    """Lost answers and damaged updates have a device give leases back, now and then several in a row."""
    file.write_text(FILE.replace("count = 6", "count = 30"))
    outcome = lived(file, "run")
    assert (outcome.state, outcome.versions) == ("finished", 30)
    assert outcome.left_out == {}


def test_bytes_of_an_update_are_those_of_trainings_and_not_of_leases_given_back(file: Path) -> None:
    text = FILE.replace('name = "board"', 'name = "board"\nmemory_mb = 5')
    file.write_text(text.replace("seed = 4", "seed = 4\nneeds_memory_mb = 100"))
    lines = list[VersionLine]()
    assert lived(file, "run", seen=lines).outcomes["gave up: runtime"] > 0
    columns, *work = map(json.loads, (file.parent / "run" / "participations.jsonl").read_text().splitlines())
    sizes = {row[columns.index("frame_bytes")] for row in work} - {0}
    assert lines[0].update_bytes is None
    for line in lines[1:]:
        assert line.update_bytes is not None
        assert min(sizes) <= line.update_bytes <= max(sizes)


def test_a_fleet_whose_devices_all_fail_ends_and_says_why(file: Path) -> None:
    text = FILE.replace('name = "phone"', 'name = "phone"\nmemory_mb = 5').replace(
        'name = "board"', 'name = "board"\nmemory_mb = 5'
    )
    file.write_text(text.replace("seed = 4", "seed = 4\nneeds_memory_mb = 100").replace("dropout = 0.2", ""))
    outcome = lived(file, "run")
    assert (outcome.state, outcome.versions) == ("ended early", 0)
    assert outcome.reason == "no device will come again"
    assert sum(outcome.left_out.values()) > 0
    assert "training needs 100 MB" in next(iter(outcome.left_out))


def test_a_fleet_of_which_nobody_can_be_taken_any_more_ends_and_says_why(file: Path) -> None:
    """Rounds take more than the quorum that the numbers were checked for: 8 and 8 of 20, then 4."""
    sampling = '\n[task.sampling]\nstrategy = "uniform"\nparticipation_cap = 1\n'
    text = FILE.replace("buffer = 6", "quorum = 3").replace("dropout = 0.2", "")
    file.write_text(text[: text.index("[faults]")] + sampling)
    outcome = lived(file, "run")
    assert (outcome.state, outcome.versions) == ("ended early", 3)
    told = "it has sent 1 updates, the task takes 1 of a device"
    assert outcome.reason == f"no device can be taken any more: {told}"
    assert outcome.virtual_s < 3600


def test_a_run_that_ends_for_its_time_says_what_devices_heard_last(file: Path) -> None:
    conditions = '\n[conditions]\nkind = "daily"\nzones_h = 0.0\nfrom_h = 12.0\n'
    text = FILE.replace("dropout = 0.2", 'power = "battery"\nlimits = { only_charging = true }')
    text = text.replace(
        'name = "board"', 'name = "board"\npower = "battery"\nlimits = { only_charging = true }'
    )
    file.write_text(text.replace("seed = 4", "seed = 4\nlast_s = 3600") + conditions)
    outcome = lived(file, "run")
    assert (outcome.state, outcome.versions) == ("ended early", 0)
    rested = "a device last rested because: it is not charging"
    assert outcome.reason == f"its time (fleet.last_s) was over; {rested}"
