from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from export.base import load_base
from export.summary import Summary, render, summarise
from export.verify import Difference
from fedtt.kinds import AdapterKind
from tests.support.adapters import KINDS, small_adapter
from tests.support.tiny import tiny_manifest


def _summary(tiny_model: Path, kind: AdapterKind = "tt") -> Summary:
    base = load_base(str(tiny_model), "sequence-classification")
    spec = small_adapter(kind, hidden=32, layers=2, head="dense")
    manifest = msgspec.structs.replace(tiny_manifest(), adapter=spec, labels=("a", "b", "c", "d"))
    return summarise(
        manifest,
        base,
        [Difference(runtime="onnxruntime", batch=1, tokens=3, loss=1e-7, grad=3e-6, logits=1e-8)],
    )


@pytest.mark.parametrize("kind", KINDS)
def test_the_parts_add_up_to_the_trained_numbers(kind: AdapterKind, tiny_model: Path) -> None:
    s = _summary(tiny_model, kind)
    assert s.head_numbers == 132  # 4 labels x (32 + 1)
    assert s.trained_numbers == s.adapted_blocks * sum(s.block_numbers.values()) + 132
    assert s.round_bytes["fp32"] == 4 * s.trained_numbers


def test_lora_is_counted_from_the_projections_of_the_model(tiny_model: Path) -> None:
    s = _summary(tiny_model)
    assert s.lora_numbers == 2180  # 2 blocks x 2 projections x 8 x (32 + 32) + 4 x (32 + 1)
    assert s.lora_round_bytes == 8720  # 4 x 2180


def test_the_rendering_names_every_figure(tiny_model: Path) -> None:
    text = render(_summary(tiny_model, "lora"))
    for part in ("LoRA", "2,180", "8.7 KB", "int4", "step.onnx", "at most 3.0e-06"):
        assert part in text
    # A 2 x 32, B 32 x 2; 2 blocks x 4 x 64 + 132
    assert "lora: 2 blocks x (query.lora_a 64 + query.lora_b 64 + value.lora_a 64 + value.lora_b 64)" in text
    assert "644 numbers, 132 of them in the head" in text


def test_the_rendering_says_where_nothing_is_inserted(tiny_model: Path) -> None:
    assert "none: the head alone" in render(_summary(tiny_model, "none"))
