from __future__ import annotations

from pathlib import Path

import msgspec

from export.base import load_base
from export.summary import Summary, render, summarise
from export.verify import Difference
from fedtt.adapter import plan_adapter
from tests.support.tiny import tiny_manifest


def _summary(tiny_model: Path) -> Summary:
    base = load_base(str(tiny_model), "sequence-classification")
    spec = plan_adapter(hidden=32, layers=2, bottleneck=8, rank=2, head="dense", labels=4)
    manifest = msgspec.structs.replace(tiny_manifest(), adapter=spec, labels=("a", "b", "c", "d"))
    return summarise(manifest, base, [Difference(batch=1, tokens=3, loss=1e-7, grad=3e-6, logits=1e-8)])


def test_the_parts_add_up_to_the_trained_numbers(tiny_model: Path) -> None:
    s = _summary(tiny_model)
    assert s.head_numbers == 132  # 4 labels x (32 + 1)
    assert s.adapted_sites == 4  # 2 blocks x 2 sites
    assert s.trained_numbers == 4 * (s.down_numbers + s.up_numbers) + 132
    assert s.round_bytes["fp32"] == 4 * s.trained_numbers


def test_lora_is_counted_from_the_projections_of_the_model(tiny_model: Path) -> None:
    s = _summary(tiny_model)
    assert s.lora_numbers == 2180  # 2 blocks x 2 projections x 8 x (32 + 32) + 4 x (32 + 1)
    assert s.lora_round_bytes == 8720  # 4 x 2180


def test_the_rendering_names_every_figure(tiny_model: Path) -> None:
    text = render(_summary(tiny_model))
    for part in ("LoRA", "2,180", "8.7 KB", "int4", "step.onnx", "at most 3.0e-06"):
        assert part in text
