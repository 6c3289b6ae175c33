from __future__ import annotations

import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from edge_client.bundle import Bundle
from edge_client.executorch_runtime import executorch_runtimes
from edge_client.onnx_runtime import OnnxRuntime, onnx_runtimes
from edge_client.runtime import Runtime, Runtimes
from fedtt.errors import ConfigError
from tests.support.edge import MeanTarget, small_bundle


def test_the_runtime_of_a_bundle_goes_when_another_is_opened(tmp_path: Path) -> None:
    runtimes, one = Runtimes(lambda _: MeanTarget()), small_bundle(tmp_path)
    first = weakref.ref(runtimes.open(one))
    assert runtimes.open(one) is first()
    runtimes.open(replace(one, digest="another"))
    assert first() is None


def test_threads_that_open_a_bundle_at_once_share_one_runtime(tmp_path: Path) -> None:
    together = threading.Barrier(4, timeout=10)

    def load(_: Bundle) -> Runtime:
        time.sleep(0.05)  # as a graph does, while the others ask
        return MeanTarget()

    def opened(_: int) -> Runtime:
        together.wait()
        return runtimes.open(bundle)

    runtimes, bundle = Runtimes(load), small_bundle(tmp_path)
    with ThreadPoolExecutor(4) as pool:
        assert len(set(pool.map(opened, range(4)))) == 1


@pytest.mark.parametrize("threads", [0, -1, 1025])
def test_a_number_of_threads_that_no_runtime_takes_as_it_is_is_refused(threads: int, tmp_path: Path) -> None:
    bundle = small_bundle(tmp_path)
    for made in (onnx_runtimes, executorch_runtimes, partial(OnnxRuntime, bundle)):
        with pytest.raises(ConfigError, match=r"threads = .* is not allowed: 1\.\.1024"):
            made(threads=threads)
