"""A base stored as int8 or fp16: the same model in torch, on the device and for many devices."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from edge_client.bundle import open_bundle
from edge_client.onnx_runtime import OnnxRuntime
from edge_client.tokens import Batch
from export import ExportRequest, export_bundle, verify_bundle
from export.base import load_base
from export.emulation import compile_emulation
from export.inputs import random_inputs
from export.step import AdaptedModel, TrainingStep
from export.verify import TOLERANCE
from fedtt.errors import BundleError
from fedtt.manifest import Precision
from fleet.backends import TorchBackend
from fleet.fastest import made_up_rows
from tests.support.models import save_tiny_model

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def int8_bundle(tiny_request: ExportRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("int8") / "bundle"
    export_bundle(replace(tiny_request, base="int8", depths=(1,)), out, verify=False)
    return out


def _gradients(bundle: Path, model: Path, precision: Precision) -> tuple[np.ndarray, np.ndarray]:
    """The device's gradient and torch's in float32 over a base of a precision, on one batch."""
    opened = open_bundle(bundle)
    manifest = opened.manifest
    adapted = AdaptedModel(load_base(str(model), manifest.task, precision), manifest.adapter, manifest.labels)
    inputs = random_inputs(adapted, 7, 11)
    arrays = {name: value.numpy() for name, value in inputs.items()}
    theta = arrays.pop("theta")
    _, found = OnnxRuntime(opened).gradient(theta, Batch(**arrays))
    with torch.no_grad():
        _, expected, _ = TrainingStep(adapted)(*inputs.values())
    return found, expected.numpy()


def test_a_device_has_the_gradient_of_the_rounded_base_and_not_of_the_first(
    int8_bundle: Path, tiny_model: Path
) -> None:
    found, expected = _gradients(int8_bundle, tiny_model, "int8")
    assert np.linalg.norm(found - expected) <= TOLERANCE * np.linalg.norm(expected)
    _, unrounded = _gradients(int8_bundle, tiny_model, "fp32")
    assert np.linalg.norm(found - unrounded) > 100 * TOLERANCE * np.linalg.norm(unrounded)


def test_step_evaluation_and_depths_agree_with_torch_on_int8(int8_bundle: Path, tiny_model: Path) -> None:
    assert max(d.largest for d in verify_bundle(int8_bundle, str(tiny_model))) <= TOLERANCE


def test_a_tied_embedding_of_a_decoder_agrees_with_torch_on_fp16(tmp_path: Path) -> None:
    model = save_tiny_model(tmp_path / "model", "llama", blocks=1)
    request = ExportRequest(
        model=str(model), task="causal-lm", bottleneck=8, rank=2, max_tokens=24, depths=(), base="fp16"
    )
    export_bundle(request, tmp_path / "bundle")  # which compares it


def test_graphs_of_many_devices_run_on_the_files_of_an_int8_bundle(
    int8_bundle: Path, tiny_model: Path
) -> None:
    directory, _ = compile_emulation(int8_bundle, str(tiny_model))  # which compares them
    assert max(path.stat().st_size for path in directory.iterdir()) < 1 << 18


def test_the_matrices_take_a_byte_a_number(int8_bundle: Path, tiny_bundle: Path, tiny_model: Path) -> None:
    sizes = [p.numel() for p in load_base(str(tiny_model), "sequence-classification").model.parameters()]
    files = [(bundle / "base.bin").stat().st_size for bundle in (int8_bundle, tiny_bundle)]
    assert files[0] < 0.5 * files[1]  # rows of 32 numbers have scales of 4 bytes
    assert files[0] > sum(sizes) * 0.9


def test_a_base_of_another_precision_has_another_name(int8_bundle: Path, tiny_bundle: Path) -> None:
    names = {open_bundle(bundle).manifest.model.base_sha256 for bundle in (int8_bundle, tiny_bundle)}
    assert len(names) == 2


def test_an_int8_bundle_is_refused_beside_other_weights(int8_bundle: Path, tmp_path: Path) -> None:
    other = save_tiny_model(tmp_path / "other", seed=1)
    with pytest.raises(BundleError, match="was made from other weights"):
        verify_bundle(int8_bundle, str(other))


# products in integers


@pytest.fixture(scope="module")
def integer_bundle(tiny_request: ExportRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("integer") / "bundle"
    request = replace(tiny_request, base="int8", products="int8", depths=())
    export_bundle(request, out, verify=False)
    return out


def test_every_graph_agrees_with_integers_in_torch(integer_bundle: Path, tiny_model: Path) -> None:
    differences = verify_bundle(integer_bundle, str(tiny_model))
    assert min(d.largest for d in differences) <= TOLERANCE  # where nothing is rounded the other way
    assert all(0 < d.largest <= d.allowed for d in differences)


def test_a_gradient_by_integers_points_where_that_of_float32_does(
    integer_bundle: Path, tiny_model: Path
) -> None:
    found, expected = _gradients(integer_bundle, tiny_model, "fp32")
    cosine = found @ expected / np.linalg.norm(found) / np.linalg.norm(expected)
    assert 0.99 < cosine < 1 - 1e-6  # and it is another


def test_a_base_for_integers_has_another_name_and_says_so(integer_bundle: Path, int8_bundle: Path) -> None:
    models = [open_bundle(bundle).manifest.model for bundle in (integer_bundle, int8_bundle)]
    assert [(m.precision, m.products) for m in models] == [("int8", "int8"), ("int8", "fp32")]
    assert models[0].base_sha256 != models[1].base_sha256


def test_what_integers_make_of_a_row_does_not_depend_on_the_others(integer_bundle: Path) -> None:
    bundle, rng = open_bundle(integer_bundle), np.random.default_rng(0)
    runtime, theta = OnnxRuntime(bundle), rng.normal(0, 0.1, bundle.manifest.adapter.layout.size)
    ids, mask = rng.integers(4, 30, (5, 9)), np.ones((5, 9), np.int64)
    together = runtime.logits(theta.astype(np.float32), Batch(ids=ids, mask=mask))
    alone = [runtime.logits(theta.astype(np.float32), Batch(ids=row[None], mask=mask[:1])) for row in ids]
    np.testing.assert_allclose(together, np.concatenate(alone), rtol=1e-5, atol=1e-5)


def test_torch_trains_many_devices_on_the_same_integers(integer_bundle: Path, tiny_model: Path) -> None:
    bundle = open_bundle(integer_bundle)
    rows = made_up_rows(bundle, devices=1, rows=5, tokens=9)
    _, found = TorchBackend(bundle, model=str(tiny_model)).step(rows)
    batch = Batch(ids=rows["ids"], mask=rows["mask"], labels=rows["labels"])
    _, alone = OnnxRuntime(bundle).gradient(rows["theta"][0], batch)
    assert np.linalg.norm(found[0] - alone) <= 1e-2 * np.linalg.norm(alone)
