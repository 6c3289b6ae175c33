"""The trainer pool on real Ray workers of this machine: the same model, whoever is killed."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from safetensors.numpy import load_file

from tests.support.long import takes_long
from tests.support.models import WORDS

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        find_spec("ray") is None, reason="SKIPPED: Ray is not installed: pip install '.[ray]'"
    ),
]

FILE = """
bundle = "bundle"
[fleet]
devices = 16
seed = 3
threads = 2
trainer = "batched-onnx"
model = {model}
[data]
train = "train.jsonl"
[task]
name = "intents"
[task.rounds]
count = 8
cohort = 8
buffer = 6
retry_s = 20
[task.training]
local_steps = 3
batch_size = 4
"""


@pytest.fixture(scope="module")
def place(
    tiny_bundle: Path, tiny_emulation: Path, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A fleet file and a bundle with its graphs of many devices."""
    place = tmp_path_factory.mktemp("ray")
    shutil.copytree(tiny_bundle, place / "bundle")
    shutil.copytree(tiny_emulation, place / "bundle.emulation")
    rows = [{"text": " ".join(WORDS[n % 20 : n % 20 + 1 + n % 5]), "label": n % 4} for n in range(96)]
    (place / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (place / "fleet.toml").write_text(FILE.format(model=json.dumps(str(tiny_model))))
    return place


Act = Callable[["subprocess.Popen[str]"], None]


def lived(
    place: Path, directory: str, *options: str, act: Act | None = None, after: int = 2
) -> tuple[int, list[dict[str, Any]], str]:
    """Exit status, lines and errors of a run; `act` is done to it once so many versions have appeared."""
    command = [
        sys.executable,
        "-m",
        "fedtt",
        "fleet",
        "run",
        "fleet.toml",
        "--dir",
        directory,
        "--json",
        *options,
    ]
    with subprocess.Popen(
        command,
        cwd=place,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # a terminal's Ctrl-C goes to all of its group
    ) as process:
        assert process.stdout is not None
        lines = [process.stdout.readline() for _ in range(after)] if act else []
        if act:
            assert all(lines), process.stderr.read() if process.stderr else ""
            act(process)
        out, err = process.communicate(timeout=300)
    return process.returncode, [json.loads(line) for line in [*lines, *out.splitlines()]], err


def family(process: subprocess.Popen[str], name: str = "") -> list[psutil.Process]:
    """What a process has started and lives, by what it calls itself."""

    def is_called(child: psutil.Process) -> bool:
        try:
            return name in " ".join(child.cmdline())
        except psutil.Error:  # it has just ended
            return False

    return [child for child in psutil.Process(process.pid).children(recursive=True) if is_called(child)]


def kill(victims: Callable[[list[psutil.Process]], Sequence[psutil.Process]]) -> Act:
    def act(process: subprocess.Popen[str]) -> None:
        workers = family(process, "ray::Worker")
        assert len(workers) == 2
        for worker in victims(workers):
            worker.kill()

    return act


@pytest.fixture(scope="module")
def over_ray(place: Path) -> dict[str, Any]:
    """The summary of a run over two workers."""
    status, lines, _ = lived(place, "ray", "--ray")
    assert status == 0
    return lines[-1]


def test_two_workers_come_to_what_one_process_does(place: Path, over_ray: dict[str, Any]) -> None:
    status, _, _ = lived(place, "alone")
    assert status == 0
    one, two, start = (
        load_file(place / path / "factors.safetensors") for path in ("alone/result", "ray/result", "bundle")
    )
    for name, factor in one.items():
        np.testing.assert_allclose(two[name], factor, rtol=1e-5, atol=1e-5 * float(np.abs(factor).max()))
    assert any((factor != start[name]).any() for name, factor in one.items())


@pytest.mark.parametrize(
    "victims",
    [
        pytest.param(lambda workers: workers[:1], marks=takes_long("losing one of two workers"), id="one"),
        pytest.param(lambda workers: workers, id="all"),
    ],
)
def test_lost_workers_cost_a_retry_and_no_bit(
    place: Path,
    over_ray: dict[str, Any],
    victims: Callable[[list[psutil.Process]], Sequence[psutil.Process]],
    request: pytest.FixtureRequest,
) -> None:
    status, lines, err = lived(place, f"killed-{request.node.callspec.id}", "--ray", act=kill(victims))
    assert (status, lines[-1]["state"]) == (0, "finished")
    assert lines[-1]["sha256"] == over_ray["sha256"]
    assert "a Ray worker was lost: what it had in hand is done again" in err


def test_ctrl_c_ends_in_order_leaves_nothing_and_the_run_goes_on(
    place: Path, over_ray: dict[str, Any]
) -> None:
    left: list[psutil.Process] = []

    def interrupt(process: subprocess.Popen[str]) -> None:
        left.extend(family(process))
        process.send_signal(signal.SIGINT)
        for child in family(process):
            child.send_signal(signal.SIGINT)

    status, lines, err = lived(place, "cut", "--ray", act=interrupt, after=1)
    assert (status, lines[-1]["state"], err) == (130, "interrupted", "")
    _, alive = psutil.wait_procs(left, timeout=20)
    assert alive == []
    status, _, err = lived(place, "cut")
    assert status == 2  # other bits: an experiment of its own
    assert "--fresh begins anew" in err
    status, lines, _ = lived(place, "cut", "--ray")
    assert (status, lines[-1]["sha256"]) == (0, over_ray["sha256"])


SCRIPT = """
import sys
from pathlib import Path
from edge_client.bundle import open_bundle
from fleet.ray_pool import RayPool
from tests.support.models import WORDS
from tests.support.requests import delta_of, requests_of
import numpy as np
bundle = open_bundle(Path(sys.argv[1]))
requests = requests_of(bundle, WORDS, (3, 9, 1, 5))
found = []
for by_path in (True, False):
    pool = RayPool(bundle, "batched-onnx", workers=2, model=sys.argv[2], by_path=by_path)
    handles = [pool.submit(request) for request in requests]
    handles[2].cancel()
    found.append([handles[n].result().frame for n in (0, 1, 3)])
    pool.close()
    pool.close()
assert found[0] == found[1]
print("the same")
"""


def test_workers_that_are_sent_the_bundle_train_as_those_that_read_it(
    place: Path, tiny_model: Path, over_ray: dict[str, Any]
) -> None:
    command = [sys.executable, "-c", SCRIPT, str(place / "bundle"), str(tiny_model)]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=root)
    assert done.stdout.endswith("the same\n"), done.stderr


OF_ANOTHER = """
import ctypes, sys
handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(int)
ctypes.pythonapi.PyOS_setsig(15, handler)
del sys.modules["_signal"]  # whose next import finds there what is no function of Python
import signal
assert signal.getsignal(15) is None
from fleet.ray_cluster import joined
with joined(None, 1) as ray:
    print("joined")
"""


def test_a_program_may_have_a_handler_of_sigterm_that_is_no_function_of_python() -> None:
    command = [sys.executable, "-c", OF_ANOTHER]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert (done.returncode, done.stdout) == (0, "joined\n"), done.stderr
