from __future__ import annotations

from pathlib import Path

import pytest
import torch

from export.base import load_base
from export.depths import PrefixStep, StepAbove
from export.inputs import random_inputs
from export.request import TaskKind
from export.step import AdaptedModel, TrainingStep
from fedtt.kinds import AdapterKind, HeadKind
from tests.support.adapters import small_adapter
from tests.support.models import save_tiny_model

LABELS = ("alarm", "lights off", "pay", "weather")


def _model(directory: Path, family: str, task: TaskKind, kind: AdapterKind = "tt") -> AdaptedModel:
    base = load_base(str(save_tiny_model(directory, family)), task)
    head: HeadKind | None = "label-names" if task == "sequence-classification" else None
    narrow = 16 if family == "llama" else None  # grouped queries
    spec = small_adapter(kind, hidden=32, layers=2, head=head, narrow=narrow)
    return AdaptedModel(base, spec, LABELS if head else ())


@pytest.mark.parametrize("kind", ["tt", "lora", "dense"])
@pytest.mark.parametrize(
    ("family", "task"),
    [("bert", "sequence-classification"), ("llama", "sequence-classification"), ("llama", "causal-lm")],
)
def test_a_step_over_its_prefix_gives_the_loss_and_the_gradient_above_the_cut(
    family: str, task: TaskKind, kind: AdapterKind, tmp_path: Path
) -> None:
    model = _model(tmp_path, family, task, kind)
    inputs = random_inputs(model, 4, 9)
    loss, gradient, _ = TrainingStep(model)(*inputs.values())
    prefix, above = PrefixStep(model, 1), StepAbove(model, 1)
    assert prefix.states == (1 if kind == "lora" else 2), "LoRA changes what the attention reads"
    with torch.no_grad():
        inputs["hidden"] = prefix(*(inputs[name] for name in prefix.inputs))
    found_loss, found = above(*(inputs[name] for name in above.inputs))
    torch.testing.assert_close(found_loss, loss)
    assert above.below == model.spec.adapter_size // 2  # one of two blocks
    assert not found[: above.below].any()
    torch.testing.assert_close(found[above.below :], gradient[above.below :], rtol=1e-4, atol=1e-6)


def test_only_factors_below_the_cut_move_what_the_prefix_gives(tmp_path: Path) -> None:
    model = _model(tmp_path, "bert", "sequence-classification")
    theta, ids, mask, _ = random_inputs(model, 4, 9).values()
    prefix, below = PrefixStep(model, 1), StepAbove(model, 1).below
    hidden = prefix(theta, ids, mask)
    moved = theta.clone()
    moved[below:] += 1
    assert torch.equal(prefix(moved, ids, mask), hidden)
    moved[:below] += 1
    assert not torch.equal(prefix(moved, ids, mask), hidden)


def test_where_the_head_alone_is_trained_the_prefix_is_the_whole_base(tmp_path: Path) -> None:
    model = _model(tmp_path, "bert", "sequence-classification", "none")
    inputs = random_inputs(model, 4, 9)
    loss, gradient, _ = TrainingStep(model)(*inputs.values())
    hidden = PrefixStep(model, 0)(inputs["theta"], inputs["ids"], inputs["mask"])
    found_loss, found = StepAbove(model, 0)(inputs["theta"], hidden, inputs["mask"], inputs["labels"])
    torch.testing.assert_close((found_loss, found), (loss, gradient))
