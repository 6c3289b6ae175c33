from __future__ import annotations

import weakref
from dataclasses import replace
from pathlib import Path

from edge_client.runtime import Runtimes
from tests.support.edge import MeanTarget, small_bundle


def test_the_runtime_of_a_bundle_goes_when_another_is_opened(tmp_path: Path) -> None:
    runtimes, one = Runtimes(lambda _: MeanTarget()), small_bundle(tmp_path)
    first = weakref.ref(runtimes.open(one))
    assert runtimes.open(one) is first()
    runtimes.open(replace(one, digest="another"))
    assert first() is None
