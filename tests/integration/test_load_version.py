"""From a version directory back to torch: the same logits as the compiled evaluation gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from safetensors.numpy import save_file
from safetensors.torch import save_file as save_tensors

from export import load_version
from export.bundle import read_bundle
from export.load import FineTunedClassifier
from fedtt.errors import BundleError
from fedtt.layout import Theta
from fedtt.manifest import MANIFEST, bundle_digest
from fedtt.version_config import CONFIG, FACTORS, encode_config, version_config
from fedtt.wire import encode_theta, version_digest
from tests.support.models import STORIES, save_tiny_model

pytestmark = pytest.mark.slow


def _save_version(bundle: Path, directory: Path) -> Theta:
    """A version with random factors, written as the aggregator writes it."""
    manifest = read_bundle(bundle)
    layout = manifest.adapter.layout
    theta = np.random.default_rng(0).normal(0, 0.2, layout.size).astype(np.float32)
    digest = bundle_digest((bundle / MANIFEST).read_bytes())
    config = version_config(manifest, digest, "tiny", 3, version_digest(encode_theta(theta)))
    directory.mkdir()
    (directory / CONFIG).write_bytes(encode_config(config))
    save_file(layout.unflatten(theta), directory / FACTORS)
    return theta


def _graph_logits(bundle: Path, theta: Theta, ids: torch.Tensor, mask: torch.Tensor) -> np.ndarray:
    session = onnxruntime.InferenceSession(bundle / "eval.onnx", providers=["CPUExecutionProvider"])
    feed = {"theta": theta, "ids": ids.numpy(), "mask": mask.numpy()}
    return np.asarray(session.run(["logits"], feed)[0])


def test_a_classifier_loads_in_one_line_and_labels_text(
    tiny_bundle: Path, tiny_model: Path, tmp_path: Path
) -> None:
    theta = _save_version(tiny_bundle, tmp_path / "version")
    model, tokenizer = load_version(tmp_path / "version", str(tiny_model))
    inputs = tokenizer("wake me at seven please", return_tensors="pt")
    logits = model(**inputs).logits
    expected = _graph_logits(tiny_bundle, theta, inputs["input_ids"], inputs["attention_mask"])
    np.testing.assert_allclose(logits.detach().numpy(), expected, rtol=1e-4, atol=1e-5)
    assert model.config.id2label == dict(enumerate(("alarm", "lights off", "pay", "weather")))


def test_a_loaded_classifier_can_be_trained_on(tiny_bundle: Path, tiny_model: Path, tmp_path: Path) -> None:
    _save_version(tiny_bundle, tmp_path / "version")
    model, tokenizer = load_version(tmp_path / "version", str(tiny_model))
    assert isinstance(model, FineTunedClassifier)
    trained = [name for name, weight in model.named_parameters() if weight.requires_grad]
    assert trained == ["theta"]
    model(**tokenizer("pay", return_tensors="pt")).logits.sum().backward()
    assert model.theta.grad is not None
    assert model.theta.grad.count_nonzero() > 0


def test_a_decoder_loads_as_a_transformers_model_that_generates(stories_bundle: Path, tmp_path: Path) -> None:
    theta = _save_version(stories_bundle, tmp_path / "version")
    model, tokenizer = load_version(tmp_path / "version", str(STORIES))
    inputs = tokenizer("Once upon a time", return_tensors="pt")
    with torch.no_grad():
        logits = model(**inputs).logits
    expected = _graph_logits(stories_bundle, theta, inputs["input_ids"], inputs["attention_mask"])
    np.testing.assert_allclose(logits.numpy(), expected, rtol=1e-3, atol=1e-3)
    generate: Any = model.generate
    written = generate(**inputs, max_new_tokens=5, do_sample=False)
    assert written.shape[1] == inputs["input_ids"].shape[1] + 5


def test_other_base_weights_are_refused(tiny_bundle: Path, tmp_path: Path) -> None:
    _save_version(tiny_bundle, tmp_path / "version")
    other = save_tiny_model(tmp_path / "other", seed=1)
    with pytest.raises(BundleError, match="was trained on other weights"):
        load_version(tmp_path / "version", str(other))


def test_one_flipped_bit_in_the_factors_is_found(tiny_bundle: Path, tiny_model: Path, tmp_path: Path) -> None:
    _save_version(tiny_bundle, tmp_path / "version")
    path = tmp_path / "version" / FACTORS
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(BundleError, match=r"factors\.safetensors cannot be used.*download"):
        load_version(tmp_path / "version", str(tiny_model))


@pytest.mark.parametrize("damage", ["config", "factors", "bfloat16", "directory"])
def test_what_is_no_version_is_refused(
    damage: str, tiny_bundle: Path, tiny_model: Path, tmp_path: Path
) -> None:
    version = tmp_path / "version"
    if damage != "directory":
        _save_version(tiny_bundle, version)
        (version / (CONFIG if damage == "config" else FACTORS)).write_text("nonsense")
    if damage == "bfloat16":
        save_tensors({"head.bias": torch.zeros(3, dtype=torch.bfloat16)}, version / FACTORS)
    with pytest.raises(BundleError, match=str(version)):
        load_version(version, str(tiny_model))
