"""Graphs of tiny models against torch, and what a bundle must and must not hold."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from safetensors.numpy import load_file
from tokenizers import Tokenizer

from export import ExportRequest, export_bundle, verify_bundle
from export.base import load_base
from export.bundle import read_bundle
from export.inputs import TRACED, random_inputs
from export.step import AdaptedModel, TrainingStep
from export.verify import TOLERANCE
from fedtt.adapter import initial_theta
from fedtt.errors import BundleError, ConfigError
from fedtt.manifest import MANIFEST, bundle_digest
from tests.conftest import TINY_LABELS
from tests.support.models import save_tiny_model

pytestmark = pytest.mark.slow

CASES: dict[str, dict[str, Any]] = {
    "roberta": {"head": "tt"},
    "distilbert": {"head": "dense", "depth": 1, "sites": ("mlp",)},
    "llama": {"head": "label-names"},
}


def _assert_agrees(bundle: Path, model: Path) -> None:
    differences = verify_bundle(bundle, str(model))
    assert {(d.batch, d.tokens) for d in differences} > {TRACED, (1, 3)}
    assert max(d.largest for d in differences) <= TOLERANCE


@pytest.mark.parametrize("family", CASES)
def test_graphs_of_each_family_agree_with_torch_at_shapes_never_traced(family: str, tmp_path: Path) -> None:
    model = save_tiny_model(tmp_path / "model", family, blocks=1)
    request = ExportRequest(
        model=str(model),
        labels=TINY_LABELS,
        bottleneck=8,
        rank=2,
        max_tokens=24,
        depths=(),
        **CASES[family],
    )
    export_bundle(request, tmp_path / "bundle", verify=False)
    _assert_agrees(tmp_path / "bundle", model)


def test_a_bert_agrees_with_torch_at_shapes_never_traced(tiny_bundle: Path, tiny_model: Path) -> None:
    _assert_agrees(tiny_bundle, tiny_model)


def test_a_real_llama_agrees_with_torch_on_next_tokens(stories_bundle: Path) -> None:
    from tests.support.models import STORIES

    _assert_agrees(stories_bundle, STORIES)
    assert read_bundle(stories_bundle).labels == ()


@pytest.mark.parametrize("lean", [False, True])
def test_graphs_run_the_same_with_the_settings_that_save_memory(
    lean: bool, tiny_bundle: Path, tiny_model: Path
) -> None:
    options = onnxruntime.SessionOptions()
    if lean:
        options.add_session_config_entry("session.disable_prepacking", "1")
        options.enable_mem_pattern = False
    disabled = ["ConstantFolding"] if lean else []
    session = onnxruntime.InferenceSession(
        tiny_bundle / "step.onnx", options, providers=["CPUExecutionProvider"], disabled_optimizers=disabled
    )
    manifest = read_bundle(tiny_bundle)
    base = load_base(str(tiny_model), manifest.task)
    model = AdaptedModel(base, manifest.adapter, manifest.labels)
    inputs = random_inputs(model, 7, 11)
    loss, gradient = session.run(["loss", "grad"], {name: x.numpy() for name, x in inputs.items()})
    expected_loss, expected, _ = TrainingStep(model)(*inputs.values())
    assert np.linalg.norm(gradient - expected.numpy()) <= TOLERANCE * float(expected.norm())
    assert loss == pytest.approx(float(expected_loss), rel=TOLERANCE)


def test_the_command_line_makes_the_same_bytes_in_another_process(
    tiny_bundle: Path, tiny_request: ExportRequest, tmp_path: Path
) -> None:
    """Under another hash seed, in another directory, replacing a bundle; and prints its figures."""
    (tmp_path / "labels.json").write_text(json.dumps(TINY_LABELS))
    shutil.copytree(tiny_bundle, tmp_path / "again")
    (tmp_path / "again" / "leftover").write_text("of the old bundle")
    manifest = json.loads((tmp_path / "again" / MANIFEST).read_bytes())
    manifest["files"]["leftover"] = manifest["files"]["tokenizer.json"]
    (tmp_path / "again" / MANIFEST).write_text(json.dumps(manifest))
    options = "--labels labels.json --out again --force --no-verify --json --bottleneck 8 --rank 2"
    more = "--head-rank 2 --max-tokens 32 --bottleneck-modes 8 --depth all --sites attention,mlp"
    found = subprocess.run(
        [sys.executable, "-m", "fedtt", "export", tiny_request.model, *options.split(), *more.split()],
        check=True,
        cwd=tmp_path,
        env=os.environ | {"PYTHONHASHSEED": "7"},
        capture_output=True,
        text=True,
    )
    assert sorted(p.name for p in tiny_bundle.iterdir()) == sorted(
        p.name for p in (tmp_path / "again").iterdir()
    )
    for path in tiny_bundle.iterdir():
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes(), path.name
    summary = json.loads(found.stdout)
    assert summary["bundle_sha256"] == bundle_digest((tiny_bundle / MANIFEST).read_bytes())
    assert summary["trained_numbers"] == 428  # 4 sites x (48 + 48) + head 40 + 4
    assert found.stderr == ""


def test_no_file_holds_a_path_of_this_machine(tiny_bundle: Path, tiny_model: Path) -> None:
    forbidden = [str(Path.home()), str(Path(__file__).parents[2]), str(tiny_model.parent), sys.prefix]
    for path in tiny_bundle.iterdir():
        data = path.read_bytes()
        assert [p for p in forbidden if p.encode() in data] == [], path.name
        assert b"site-packages" not in data, path.name


def test_both_graphs_read_one_file_that_holds_each_weight_once(tiny_bundle: Path, tiny_model: Path) -> None:
    base = load_base(str(tiny_model), "sequence-classification")
    different = {weight.numpy().tobytes() for weight in base.model.parameters()}
    weights_bytes = sum(len(data) for data in different if len(data) > 256)  # smaller stay in the graph
    names_bytes = 4 * 4 * 32  # a row for each of 4 labels
    stored_bytes = (tiny_bundle / "base.bin").stat().st_size
    assert 0 <= stored_bytes - weights_bytes - names_bytes <= 512  # and the model's own small tables
    spans = {
        name: {
            tensor.name: tuple((entry.key, entry.value) for entry in tensor.external_data)
            for tensor in onnx.load(tiny_bundle / name, load_external_data=False).graph.initializer
            if tensor.external_data
        }
        for name in ("step.onnx", "eval.onnx")
    }
    assert spans["eval.onnx"].items() <= spans["step.onnx"].items()
    assert len(set(spans["step.onnx"].values())) == len(spans["step.onnx"])
    assert "transformer.encoder.layer.0.output.dense.weight" in spans["eval.onnx"]


def test_the_signature_is_what_the_manifest_promises(tiny_bundle: Path) -> None:
    def signature(name: str) -> tuple[dict[str, Any], dict[str, Any]]:
        session = onnxruntime.InferenceSession(tiny_bundle / name, providers=["CPUExecutionProvider"])
        inputs, outputs = session.get_inputs(), session.get_outputs()
        return {x.name: (x.type, x.shape) for x in inputs}, {x.name: x.shape for x in outputs}

    rows = ["batch", "tokens"]
    common = {
        "theta": ("tensor(float)", [428]),  # 4 sites x (48 + 48) + head 40 + 4
        "ids": ("tensor(int64)", rows),
        "mask": ("tensor(int64)", rows),
    }
    labels = {"labels": ("tensor(int64)", ["batch"])}
    assert signature("step.onnx") == (common | labels, {"loss": [], "grad": [428]})
    assert signature("eval.onnx") == (common, {"logits": ["batch", 4]})


def test_graphs_use_standard_operators_only_and_no_sequences(tiny_bundle: Path) -> None:
    for name in ("step.onnx", "eval.onnx"):
        model = onnx.load(tiny_bundle / name, load_external_data=False)
        assert [(o.domain, o.version) for o in model.opset_import] == [("", 20)]
        assert {node.domain for node in model.graph.node} == {""}
        assert not {node.op_type for node in model.graph.node} & {
            "SplitToSequence",
            "SequenceAt",
            "Loop",
            "If",
        }


def test_first_factors_and_tokenizer_are_those_of_the_request(tiny_bundle: Path) -> None:
    manifest = read_bundle(tiny_bundle)
    factors = load_file(tiny_bundle / manifest.initial)
    assert np.array_equal(manifest.adapter.layout.flatten(factors), initial_theta(manifest.adapter, 0))
    tokenizer = Tokenizer.from_file(str(tiny_bundle / manifest.tokenization.file))
    encoded = tokenizer.encode(" ".join(["weather"] * 50))
    assert len(encoded.ids) == 32  # max_tokens
    assert encoded.tokens[0] == "<s>"
    assert encoded.tokens[-1] == "</s>"


def test_a_bundle_is_refused_for_comparison_with_other_weights(tiny_bundle: Path, tmp_path: Path) -> None:
    other = save_tiny_model(tmp_path / "other", seed=1)
    with pytest.raises(BundleError, match="was made from other weights"):
        verify_bundle(tiny_bundle, str(other))


def test_texts_longer_than_the_positions_are_refused_before_tracing(tiny_model: Path, tmp_path: Path) -> None:
    request = ExportRequest(model=str(tiny_model), labels=TINY_LABELS, bottleneck=8, max_tokens=41)
    with pytest.raises(ConfigError, match=r"max_tokens = 41 .*from 3 to 40"):
        export_bundle(request, tmp_path / "bundle")
    assert list(tmp_path.iterdir()) == []


def test_graphs_that_differ_from_torch_are_refused(tiny_bundle: Path, tiny_model: Path) -> None:
    from export.verify import verify_graphs

    manifest = read_bundle(tiny_bundle)
    base = load_base(str(tiny_model), manifest.task)
    with torch.no_grad():
        next(base.model.parameters()).mul_(1.01)
    model = AdaptedModel(base, manifest.adapter, manifest.labels)
    with pytest.raises(BundleError, match=r"graph and torch differ by .* on a batch of"):
        verify_graphs(tiny_bundle, manifest, model)
