"""What a Ray worker does, without Ray; and where Ray is refused before it is asked."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from tempfile import gettempdir

import pytest

from edge_client.bundle import Bundle, open_bundle
from fedtt.errors import ConfigError, FedttError, Unreachable
from fleet.parcels import decode_answers, encode_work, update_of
from fleet.pool import NoopPool, Outstanding
from fleet.ray_cluster import joined
from fleet.ray_pool import RayPool, parts
from fleet.ray_worker import Worker, files_of
from tests.support.edge import WORDS, write_small_bundle
from tests.support.requests import requests_of


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    write_small_bundle(tmp_path / "bundle", base_bytes=10)
    beside = tmp_path / "bundle.emulation"
    beside.mkdir()
    (beside / "devices.onnx").write_bytes(b"graph")
    return open_bundle(tmp_path / "bundle")


def trained(worker: Worker, bundle: Bundle) -> list[bytes]:
    requests = requests_of(bundle, WORDS, (3, 1, 2))
    return [update_of(answer).frame for answer in decode_answers(worker.train(encode_work(requests)))]


def alone(bundle: Bundle) -> list[bytes]:
    pool = NoopPool()
    return [pool.submit(request).result().frame for request in requests_of(bundle, WORDS, (3, 1, 2))]


def unpacked(run: str) -> list[Path]:
    return list(Path(gettempdir()).glob(f"fedtt-ray-{run}-*"))


def test_a_worker_reads_the_bundle_where_it_lies(bundle: Bundle) -> None:
    worker = Worker("here", "noop", 1, None)
    opened = worker.open(str(bundle.directory), bundle.digest)
    assert (opened.has_bundle, opened.refusal) == (True, "")
    assert trained(worker, bundle) == alone(bundle)
    worker.close()


def test_a_worker_elsewhere_is_sent_the_files_and_leaves_none(bundle: Bundle) -> None:
    worker, neighbour = Worker("sent", "noop", 1, None), Worker("sent", "noop", 1, None)
    assert not worker.open(str(bundle.directory / "elsewhere"), bundle.digest).has_bundle
    assert not worker.open(str(bundle.directory), "0" * 64).has_bundle
    files = files_of(bundle)
    assert "bundle.emulation/devices.onnx" in files
    for each in (worker, neighbour):
        assert each.unpack(list(files), *(path.read_bytes() for path in files.values())).refusal == ""
    assert trained(worker, bundle) == alone(bundle)
    assert [home.stat().st_mode & 0o777 for home in unpacked("sent")] == [0o700, 0o700]
    worker.close()  # also for the neighbour, which may have been killed
    assert unpacked("sent") == []


def test_a_worker_that_cannot_train_says_why(bundle: Bundle) -> None:
    opened = Worker("none", "batched-onnx", 1, None).open(str(bundle.directory), bundle.digest)
    assert opened.has_bundle
    assert "model" in opened.refusal


@pytest.mark.parametrize(("waiting", "workers"), [(0, 2), (1, 2), (2, 2), (7, 2), (7, 3), (100, 16), (3, 5)])
def test_work_is_cut_in_order_into_parts_one_apart(bundle: Bundle, waiting: int, workers: int) -> None:
    (request,) = requests_of(bundle, WORDS, (1,))
    handles = [Outstanding(lambda: None, request) for _ in range(waiting)]
    cut = parts(handles, workers)
    assert [handle for part in cut for handle in part] == handles
    sizes = [len(part) for part in cut]
    assert len(sizes) == min(waiting, workers)
    assert not sizes or max(sizes) - min(sizes) <= 1
    assert 0 not in sizes


@pytest.mark.parametrize("address", ["nonsense", "ray://head:10001", "head:0", "head:65536", "head:", ":1"])
def test_an_address_that_is_none_is_refused(address: str) -> None:
    with pytest.raises(ConfigError, match="HOST:PORT"), joined(address, 1):
        pass


def test_an_address_where_nobody_listens_is_refused_at_once() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and does not listen
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(Unreachable, match=r"there is no Ray at 127\.0"), joined(address, 1):
            pass


NO_START = """
import signal
from fedtt.errors import Unreachable
from fleet.ray_cluster import joined
before = lambda number, frame: None
signal.signal(signal.SIGTERM, before)
try:
    with joined(None, 1):
        pass
except Unreachable as error:
    print(error)
assert signal.getsignal(signal.SIGTERM) is before
"""


@pytest.mark.skipif(find_spec("ray") is None, reason="SKIPPED: Ray is not installed: pip install '.[ray]'")
def test_a_program_keeps_its_own_sigterm_where_ray_does_not_start() -> None:
    environment = os.environ | {"RAY_JOB_CONFIG_JSON_ENV_VAR": "no JSON"}  # read once it has taken SIGTERM
    command = [sys.executable, "-c", NO_START]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Ray did not start here: ")


def test_no_workers_are_refused(bundle: Bundle) -> None:
    with pytest.raises(ConfigError, match="--ray-workers"):
        RayPool(bundle, "noop", workers=0)


def test_without_the_package_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)  # as where it is not installed
    with pytest.raises(FedttError, match=r"pip install 'fedtt\[ray\]'"), joined(None, 1):
        pass


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--ray-workers", "3"), "--ray-workers = 3 is not allowed: given together with --ray"),
        (("--ray-address", "auto"), "--ray-address = 'auto' is not allowed: given together with --ray"),
    ],
)
def test_options_of_ray_mean_nothing_without_it(tmp_path: Path, options: tuple[str, ...], said: str) -> None:
    command = [sys.executable, "-m", "fedtt", "fleet", "run", "none.toml", *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (2, f"fedtt: error: {said}\n")
