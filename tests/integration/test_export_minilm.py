"""The real MiniLM-L6 at full depth, through the command line."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from safetensors.numpy import load_file
from tokenizers import Tokenizer

from export import verify_bundle
from export.bundle import read_bundle
from fedtt.cli import main
from tests.support.models import minilm_directory

pytestmark = pytest.mark.slow

UTTERANCES = Path(__file__).parents[2] / "fleet" / "assistant" / "utterances.jsonl"


def test_its_graphs_agree_with_torch_at_every_shape(minilm_bundle: Path) -> None:
    differences = verify_bundle(minilm_bundle, str(minilm_directory()))
    assert (4, 128) in {(d.batch, d.tokens) for d in differences}
    assert max(d.largest for d in differences) <= 1e-5


def test_it_weighs_no_more_than_its_weights(minilm_bundle: Path) -> None:
    files = read_bundle(minilm_bundle).files
    graphs = files["step.onnx"].bytes + files["eval.onnx"].bytes
    assert graphs < 300_000
    assert files["base.bin"].bytes + graphs < 92e6


def test_it_trains_as_many_numbers_as_fedtt_says(minilm_bundle: Path) -> None:
    spec = read_bundle(minilm_bundle).adapter
    # ranks 5 inside, modes 8·8·6 | 8·8: 8·5 + 5·8·5 + 5·6·5 + 5·8·5 + 5·8 = 630, and as many for up
    assert {matrix.size for prefix, matrix, _ in spec.tt_matrices if prefix != "head.weight"} == {630}
    head = spec.layout.size - 12 * 1260
    assert head == sum(f.size for f in spec.layout.factors if f.name.startswith("head."))


def test_it_tells_intents_apart_from_their_names_before_any_training(minilm_bundle: Path) -> None:
    manifest = read_bundle(minilm_bundle)
    rows = [json.loads(line) for line in UTTERANCES.read_text().splitlines()][::8]
    tokenizer = Tokenizer.from_file(str(minilm_bundle / "tokenizer.json"))
    tokenizer.enable_padding(pad_id=manifest.tokenization.pad_id)
    encoded = tokenizer.encode_batch([row["text"] for row in rows])
    feed = {
        "theta": manifest.adapter.layout.flatten(load_file(minilm_bundle / manifest.initial)),
        "ids": np.array([e.ids for e in encoded], np.int64),
        "mask": np.array([e.attention_mask for e in encoded], np.int64),
    }
    session = onnxruntime.InferenceSession(minilm_bundle / "eval.onnx", providers=["CPUExecutionProvider"])
    (logits,) = session.run(["logits"], feed)
    expected = np.array([manifest.labels.index(row["label"]) for row in rows])
    assert np.mean(np.asarray(logits).argmax(1) == expected) > 0.4  # 1 in 16 by chance


def test_verify_prints_each_shape_and_the_differences(
    tiny_bundle: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["verify", str(tiny_bundle), "--model", str(tiny_model)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert re.match(r" 3 x 10 +traced +loss \d\.\de[-+]\d\d", lines[0])
    assert sum("unseen" in line for line in lines) == 4
    assert "largest" in lines[-1]
