"""Every kind of adapter through the whole route: exported, compared, trained on a device, loaded back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from edge_client.bundle import open_bundle
from edge_client.inference import Model
from edge_client.onnx_runtime import OnnxRuntime
from edge_client.tokens import Tokens
from export import ExportRequest, export_bundle, load_version
from export.verify import TOLERANCE
from fedtt.adapter import initial_theta
from fedtt.kinds import AdapterKind
from fedtt.manifest import MANIFEST, bundle_digest
from fedtt.version_config import CONFIG, FACTORS, encode_config, version_config
from fedtt.wire import encode_theta, version_digest
from tests.conftest import TINY_LABELS
from tests.support.long import takes_long
from tests.support.models import STORIES, minilm_directory, save_tiny_model

pytestmark = pytest.mark.slow

OTHERS: dict[AdapterKind, dict[str, Any]] = {
    "dense": {"bottleneck": 8},
    "lora": {"rank": 4, "alpha": 8, "targets": ("query", "key", "value", "output")},
    "lora-sb": {"rank": 4},
    "none": {},
}
TEXTS = ["wake me at seven please", "lights off", "pay my card"]


@pytest.fixture(scope="module", params=OTHERS)
def kind(request: pytest.FixtureRequest) -> AdapterKind:
    found: AdapterKind = request.param
    return found


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama whose values are narrower than its queries."""
    return save_tiny_model(tmp_path_factory.mktemp("models") / "llama", "llama", blocks=1)


@pytest.fixture(scope="module")
def bundle(kind: AdapterKind, decoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of that decoder as a classifier, compared with torch when it is made."""
    directory = tmp_path_factory.mktemp("bundles") / kind
    request = ExportRequest(
        model=str(decoder), labels=TINY_LABELS, max_tokens=32, adapter=kind, depths=(), **OTHERS[kind]
    )
    summary = export_bundle(request, directory)
    assert summary.largest_difference is not None
    assert summary.largest_difference <= TOLERANCE
    return directory


def test_a_device_trains_it_down_its_gradient(bundle: Path) -> None:
    opened = open_bundle(bundle)
    runtime, theta = OnnxRuntime(opened), initial_theta(opened.manifest.adapter, 0)
    batch = Tokens(opened).batch(TEXTS, [0, 1, 2])[0]
    first, gradient = runtime.gradient(theta, batch)
    assert gradient.shape == theta.shape
    for _ in range(5):
        _, gradient = runtime.gradient(theta, batch)
        theta = theta - (0.1 * gradient / np.linalg.norm(gradient)).astype(np.float32)
    assert runtime.gradient(theta, batch)[0] < first


def test_a_version_of_it_is_the_same_on_the_device_and_in_torch(
    bundle: Path, decoder: Path, tmp_path: Path
) -> None:
    opened = open_bundle(bundle)
    layout = opened.manifest.adapter.layout
    theta = np.random.default_rng(0).normal(0, 0.2, layout.size).astype(np.float32)
    digest = bundle_digest((bundle / MANIFEST).read_bytes())
    config = version_config(opened.manifest, digest, "tiny", 3, version_digest(encode_theta(theta)))
    (tmp_path / CONFIG).write_bytes(encode_config(config))
    save_file(layout.unflatten(theta), tmp_path / FACTORS)
    predicted = Model.open(tmp_path, bundle).predict(TEXTS)
    model, tokenizer = load_version(tmp_path, str(decoder))
    for prediction in predicted:
        logits = model(**tokenizer(prediction.text, return_tensors="pt")).logits
        expected = logits.softmax(-1)[0].tolist()
        assert list(prediction.probabilities.values()) == pytest.approx(expected, rel=1e-3, abs=1e-5)


@takes_long("exporting the real MiniLM under LoRA")
def test_the_real_minilm_starts_from_the_same_logits_under_lora(minilm_bundle: Path, tmp_path: Path) -> None:
    """Under one head no method begins ahead of another; graphs agree with torch within the tolerance."""
    plain = open_bundle(minilm_bundle)
    request = ExportRequest(
        model=str(minilm_directory()),
        labels=plain.manifest.labels,
        adapter="lora",
        depth=1,
        depths=(),
    )
    summary = export_bundle(request, tmp_path / "bundle")
    assert summary.largest_difference is not None
    assert summary.largest_difference <= TOLERANCE
    logits = []
    for opened in (plain, open_bundle(tmp_path / "bundle")):
        theta = initial_theta(opened.manifest.adapter, 0)
        logits.append(OnnxRuntime(opened).logits(theta, Tokens(opened).batch(TEXTS)[0]))
    np.testing.assert_allclose(logits[1], logits[0], rtol=1e-4, atol=1e-4)


def test_lora_on_a_real_decoder_with_grouped_queries_agrees_with_torch(tmp_path: Path) -> None:
    if not STORIES.is_dir():
        pytest.skip(f"the stories260k decoder is not at {STORIES}")
    request = ExportRequest(model=str(STORIES), task="causal-lm", adapter="lora", depth=2, depths=())
    summary = export_bundle(request, tmp_path / "bundle")
    # rank 8 on query (64, 64) and value (64, 32) of 2 blocks: 2 · 8 · (128 + 96)
    assert summary.trained_numbers == 3_584
    assert summary.largest_difference is not None
    assert summary.largest_difference <= TOLERANCE
