"""A device of a smaller rank on the bundle's own graph, against a bundle that was exported at that rank."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from msgspec.structs import replace

from edge_client.bundle import Bundle, open_bundle
from edge_client.onnx_runtime import onnx_runtimes
from edge_client.trainer import LocalUpdate, TrainingRequest
from export import ExportRequest, export_bundle
from fedtt.algorithms import FlexLoRA, Method, TTSVDFedTT
from fedtt.kinds import AdapterKind
from fleet.batched import onnx_pool
from fleet.pool import OneByOnePool, Pool
from tests.support.models import WORDS, save_tiny_model
from tests.support.requests import delta_of, requests_of

pytestmark = pytest.mark.slow

METHODS: dict[AdapterKind, Method] = {"tt": TTSVDFedTT(), "lora": FlexLoRA()}
COUNTS = (3, 9, 5)


@pytest.fixture(scope="module", params=METHODS)
def kind(request: pytest.FixtureRequest) -> AdapterKind:
    found: AdapterKind = request.param
    return found


@pytest.fixture(scope="module")
def bundles(kind: AdapterKind, tmp_path_factory: pytest.TempPathFactory) -> tuple[Bundle, Bundle, Path]:
    """Of one tiny BERT with adapters of rank 3, and of rank 1; α / r is 2 in both."""
    directory = tmp_path_factory.mktemp(kind)
    model, opened = save_tiny_model(directory / "model", blocks=1), []
    for rank in (3, 1):
        request = ExportRequest(
            model=str(model),
            labels=("a", "b", "c"),
            adapter=kind,
            rank=rank,
            max_tokens=32,
            depths=(),
            bottleneck=8 if kind == "tt" else None,
            alpha=2.0 * rank if kind == "lora" else None,
        )
        export_bundle(request, directory / str(rank), verify=False)
        opened.append(open_bundle(directory / str(rank)))
    return opened[0], opened[1], model


def updates(pool: Pool, requests: list[TrainingRequest]) -> list[LocalUpdate]:
    handles = [pool.submit(request) for request in requests]
    found = [handle.result() for handle in handles]
    pool.close()
    return found


@pytest.mark.parametrize("batched", [False, True], ids=["a device", "a fleet"])
def test_the_same_update_comes_of_it(
    kind: AdapterKind, bundles: tuple[Bundle, Bundle, Path], batched: bool
) -> None:
    large, small, model = bundles
    own = requests_of(small, WORDS, COUNTS, method=METHODS[kind])
    lent = [
        replace(request, bundle=large, plan=replace(request.plan, bundle=large.digest, rank=1))
        for request in own
    ]
    pool = onnx_pool(large, model=str(model), threads=1) if batched else OneByOnePool(onnx_runtimes())
    wanted, found = updates(OneByOnePool(onnx_runtimes()), own), updates(pool, lent)
    for request, ours, theirs in zip(own, found, wanted, strict=True):
        a, b = delta_of(request, ours), delta_of(request, theirs)
        assert np.linalg.norm(b) > 1e-3
        assert np.linalg.norm(a - b) / np.linalg.norm(b) < 1e-4
        assert ours.header.loss_first == pytest.approx(theirs.header.loss_first, rel=1e-5)
        assert ours.header.layout == theirs.header.layout
        assert len(ours.frame) == len(theirs.frame)
