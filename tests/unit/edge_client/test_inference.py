"""A downloaded version in use, on a real exported graph."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from edge_client.bundle import open_bundle
from edge_client.examples import Example
from edge_client.inference import Model
from edge_client.onnx_runtime import OnnxRuntime
from edge_client.tokens import Tokens
from fedtt.adapter import initial_theta
from fedtt.cli import main
from fedtt.errors import BundleError, DataError, LayoutError
from fedtt.layout import Theta
from fedtt.version_config import CONFIG, FACTORS, encode_config, version_config
from fedtt.wire import encode_theta, version_digest
from tests.support.lying_factors import LIES

TEXTS = ["set the alarm", "lights off", "pay my card", "weather today"]


@pytest.fixture
def theta(tiny_bundle: Path) -> Theta:
    spec = open_bundle(tiny_bundle).manifest.adapter
    noise = np.random.default_rng(1).normal(0, 0.3, spec.layout.size)
    return initial_theta(spec, 0) + noise.astype(np.float32)


@pytest.fixture
def version(tiny_bundle: Path, theta: Theta, tmp_path: Path) -> Path:
    """A version directory as the aggregator writes it."""
    bundle = open_bundle(tiny_bundle)
    directory = tmp_path / "version"
    directory.mkdir()
    save_file(bundle.manifest.adapter.layout.unflatten(theta), directory / FACTORS)
    config = version_config(bundle.manifest, bundle.digest, "t", 3, version_digest(encode_theta(theta)))
    (directory / CONFIG).write_bytes(encode_config(config))
    return directory


def test_predictions_are_those_of_the_graph_at_the_versions_factors(
    tiny_bundle: Path, version: Path, theta: Theta
) -> None:
    bundle = open_bundle(tiny_bundle)
    found = Model.open(version, tiny_bundle).predict(TEXTS)
    batch, _ = Tokens(bundle).batch(TEXTS)
    logits = OnnxRuntime(bundle).logits(theta, batch).astype(np.float64)
    expected = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    for prediction, row in zip(found, expected, strict=True):
        assert list(prediction.probabilities) == list(bundle.manifest.labels)
        np.testing.assert_allclose(list(prediction.probabilities.values()), row, rtol=1e-5)
        assert prediction.label == bundle.manifest.labels[row.argmax()]
        assert prediction.probability == pytest.approx(row.max())


def test_many_texts_are_taken_in_batches(tiny_bundle: Path, version: Path) -> None:
    model = Model.open(version, tiny_bundle)
    many = model.predict(TEXTS * 20)  # 80 texts, 32 a batch
    assert [p.label for p in many] == [p.label for p in model.predict(TEXTS)] * 20


LONG = "lights off " * 40  # 80 words, the graph takes 32 tokens


def test_a_text_longer_than_the_graph_is_marked_as_cut(tiny_bundle: Path, version: Path) -> None:
    model = Model.open(version, tiny_bundle)
    assert [p.cut for p in model.predict([TEXTS[0], LONG, *TEXTS * 10, LONG])] == [
        *(False, True),
        *[False] * 40,
        True,
    ]
    assert [model.is_cut(text) for text in (TEXTS[0], LONG)] == [False, True]
    label = model.manifest.labels[0]
    assert model.evaluate([Example(text, label) for text in (LONG, TEXTS[0], LONG)]).cut_texts == 2


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ([TEXTS[0]], ""),
        ([TEXTS[0], LONG], "1 text was longer than 32 tokens and was cut\n"),
        ([LONG, LONG], "2 texts were longer than 32 tokens and were cut\n"),
    ],
)
@pytest.mark.parametrize("command", ["predict", "evaluate"])
def test_the_commands_say_how_many_texts_were_cut(
    tiny_bundle: Path,
    version: Path,
    command: str,
    texts: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    rows = version / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": text, "label": 0}) + "\n" for text in texts))
    what = texts if command == "predict" else [str(rows)]
    assert main([command, str(version), *what, "--bundle", str(tiny_bundle), "--json"]) == 0
    out, err = capsys.readouterr()
    assert err == message
    answers = [json.loads(line) for line in out.splitlines()]
    counted = sum(answer["cut"] if command == "predict" else answer["cut_texts"] for answer in answers)
    assert counted == texts.count(LONG)


def test_the_bundle_is_looked_for_beside_the_version(tiny_bundle: Path, version: Path) -> None:
    shutil.copytree(tiny_bundle, version / "bundle")
    assert len(Model.open(version).predict(TEXTS)) == 4


def test_evaluation_counts_right_labels_and_averages_the_loss(tiny_bundle: Path, version: Path) -> None:
    model = Model.open(version, tiny_bundle)
    predictions = model.predict(TEXTS)
    labels = model.manifest.labels
    wrong = next(label for label in labels if label != predictions[0].label)
    examples = [Example(TEXTS[0], wrong), *(Example(p.text, p.label) for p in predictions[1:])]
    found = model.evaluate(examples * 10)
    assert found.examples == 40
    assert found.accuracy == pytest.approx(30 / 40)
    chosen = [predictions[0].probabilities[wrong], *(p.probability for p in predictions[1:])]
    assert found.loss == pytest.approx(-np.log(chosen).mean(), rel=1e-6)


def test_an_unlabelled_row_cannot_be_judged(tiny_bundle: Path, version: Path) -> None:
    with pytest.raises(DataError, match=r"t\.csv row 2: the example has no label"):
        Model.open(version, tiny_bundle).evaluate([Example("x", None, "t.csv row 2")])


def test_factors_that_were_changed_are_noticed(tiny_bundle: Path, version: Path) -> None:
    factors = load_file(version / FACTORS)
    next(iter(factors.values()))[...] += 1
    save_file(factors, version / FACTORS)
    with pytest.raises(BundleError, match=r"does not match the sha256 in config\.json"):
        Model.open(version, tiny_bundle)


def test_factors_of_another_layout_are_named(tiny_bundle: Path, version: Path) -> None:
    factors = load_file(version / FACTORS)
    factors.pop("head.bias")
    save_file(factors, version / FACTORS)
    with pytest.raises(LayoutError, match=r"factor 'head\.bias' is missing; download the version again"):
        Model.open(version, tiny_bundle)


@pytest.mark.parametrize("data", LIES)
def test_factors_behind_a_header_that_lies_are_refused(tiny_bundle: Path, version: Path, data: bytes) -> None:
    (version / FACTORS).write_bytes(data)
    with pytest.raises((BundleError, LayoutError), match="download the version again") as error:
        Model.open(version, tiny_bundle)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("name", "message"), [(CONFIG, r"it has no config\.json"), (FACTORS, "is missing")])
def test_a_missing_file_is_named(tiny_bundle: Path, version: Path, name: str, message: str) -> None:
    (version / name).unlink()
    with pytest.raises(BundleError, match=message):
        Model.open(version, tiny_bundle)


def test_another_bundle_than_the_version_was_trained_with_is_refused(
    tiny_bundle: Path, version: Path, tmp_path: Path
) -> None:
    other = Path(shutil.copytree(tiny_bundle, tmp_path / "other"))
    (other / "manifest.json").write_bytes((other / "manifest.json").read_bytes() + b"\n")
    with pytest.raises(BundleError, match="name the right one with --bundle"):
        Model.open(version, other)
