from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from export.base import load_base
from fedtt.errors import ConfigError
from tests.support.models import save_tiny_model

FAMILIES = ("bert", "roberta", "distilbert", "llama")


@pytest.mark.parametrize("family", FAMILIES)
def test_own_masks_and_positions_give_what_transformers_gives_from_a_plain_mask(
    family: str, tmp_path: Path
) -> None:
    base = load_base(str(save_tiny_model(tmp_path, family)), "sequence-classification")
    ids = torch.tensor([[1, 9, 10, 11, 2], [1, 12, 2, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    with torch.no_grad():
        expected = base.model(input_ids=ids, attention_mask=mask)[0]
        found = base.run(ids, mask)
    torch.testing.assert_close(found[mask == 1], expected[mask == 1], rtol=1e-5, atol=1e-6)


def test_padding_does_not_change_what_a_text_means(tiny_model: Path) -> None:
    base = load_base(str(tiny_model), "sequence-classification")
    alone, padded = torch.tensor([[1, 9, 2]]), torch.tensor([[1, 9, 2, 7, 7]])
    with torch.no_grad():
        expected = base.run(alone, torch.ones_like(alone))
        found = base.run(padded, torch.tensor([[1, 1, 1, 0, 0]]))
    torch.testing.assert_close(found[:, :3], expected, rtol=1e-5, atol=1e-6)


def test_a_missing_directory_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"'\./nowhere'.*no such directory"):
        load_base("./nowhere", "sequence-classification")


def test_a_hub_id_that_cannot_be_reached_is_refused_in_one_line() -> None:
    with pytest.raises(ConfigError, match="no-such/model") as caught:
        load_base("no-such/model", "sequence-classification")
    assert "\n" not in str(caught.value)


def test_a_directory_without_weights_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((tiny_model / "config.json").read_bytes())
    with pytest.raises(ConfigError, match="weights"):
        load_base(str(tmp_path), "sequence-classification")


def test_cut_off_weights_are_refused(tmp_path: Path) -> None:
    save_tiny_model(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ConfigError, match="must load"):
        load_base(str(tmp_path), "sequence-classification")


def test_weights_that_lack_a_layer_are_refused(tmp_path: Path) -> None:
    save_tiny_model(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    with pytest.raises(ConfigError, match=r"encoder\.layer\.2.*missing"):
        load_base(str(tmp_path), "sequence-classification")


def test_an_unknown_architecture_is_refused_before_weights_are_read(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(ConfigError, match=r"model_type = 'gpt2' .*registry"):
        load_base(str(tmp_path), "sequence-classification")


def test_an_encoder_is_refused_for_next_token_prediction(tiny_model: Path) -> None:
    with pytest.raises(ConfigError, match="bert is an encoder"):
        load_base(str(tiny_model), "causal-lm")


def test_equal_weights_have_equal_digests_and_others_have_not(tmp_path: Path) -> None:
    digests = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        directory = save_tiny_model(tmp_path / name, seed=seed)
        digests.append(load_base(str(directory), "sequence-classification").sha256)
    assert digests[0] == digests[1] != digests[2]


def test_the_longest_text_leaves_room_for_skipped_positions(tmp_path: Path) -> None:
    base = load_base(str(save_tiny_model(tmp_path, "roberta")), "sequence-classification")
    assert base.longest == 39  # 40 positions - 1 for the padding id 0
