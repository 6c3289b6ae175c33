from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from export.base import load_base
from export.inputs import random_inputs
from export.step import AdaptedModel, TrainingStep
from fedtt.kinds import HeadKind
from fedtt.planning import plan_adapter, plan_head, plan_tt
from tests.support.models import save_tiny_model

LABELS = ("alarm", "lights off", "pay", "weather")


def _classifier(directory: Path, family: str = "bert", head: HeadKind = "label-names") -> AdaptedModel:
    base = load_base(str(save_tiny_model(directory, family)), "sequence-classification")
    top = plan_head(head, hidden=32, labels=4, rank=2)
    spec = plan_adapter(plan_tt(hidden=32, bottleneck=8, rank=2), hidden=32, layers=2, head=top)
    return AdaptedModel(base, spec, LABELS)


def _decoder(directory: Path) -> AdaptedModel:
    base = load_base(str(save_tiny_model(directory, "llama")), "causal-lm")
    return AdaptedModel(base, plan_adapter(plan_tt(hidden=32, bottleneck=8, rank=2), hidden=32, layers=2))


@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert", "llama"])
def test_the_functional_gradient_is_that_of_autograd(family: str, tmp_path: Path) -> None:
    model = _classifier(tmp_path, family)
    theta, ids, mask, labels = random_inputs(model, 4, 9).values()
    loss, gradient, _ = TrainingStep(model)(theta, ids, mask, labels)
    leaf = theta.clone().requires_grad_()
    expected = F.cross_entropy(model(leaf, ids, mask), labels)
    expected.backward()  # type: ignore[no-untyped-call]
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradient, leaf.grad, rtol=1e-4, atol=1e-6)
    assert gradient.count_nonzero() == theta.numel()


@pytest.mark.parametrize("head", ["tt", "dense"])
def test_other_heads_train_all_their_numbers_too(head: HeadKind, tmp_path: Path) -> None:
    model = _classifier(tmp_path, head=head)
    inputs = random_inputs(model, 4, 9)
    _, gradient, logits = TrainingStep(model)(*inputs.values())
    assert logits.shape == (4, 4)
    assert gradient.count_nonzero() == inputs["theta"].numel()


def test_the_next_token_loss_is_that_of_transformers(tmp_path: Path) -> None:
    model = _decoder(tmp_path)
    theta, ids, mask = random_inputs(model, 3, 8).values()
    loss, _ = model.loss(theta, ids, mask)
    targets = ids.masked_fill(mask == 0, -100)[:, 1:]
    logits = model(theta, ids, mask)[:, :-1]
    torch.testing.assert_close(loss, F.cross_entropy(logits.transpose(1, 2), targets, ignore_index=-100))


def test_a_batch_of_single_tokens_has_next_token_loss_zero_and_a_finite_gradient(tmp_path: Path) -> None:
    model = _decoder(tmp_path)
    theta, ids, _ = random_inputs(model, 2, 4).values()
    mask = torch.tensor([[1, 0, 0, 0]] * 2)
    loss, gradient, _ = TrainingStep(model)(theta, ids, mask)
    assert loss == 0
    assert gradient.isfinite().all()


def test_what_stands_in_padding_changes_neither_loss_nor_gradient(tmp_path: Path) -> None:
    model = _classifier(tmp_path)
    theta, ids, mask, labels = random_inputs(model, 4, 9).values()
    other = torch.where(mask == 1, ids, 5)
    assert not torch.equal(ids, other)
    step = TrainingStep(model)
    torch.testing.assert_close(step(theta, other, mask, labels), step(theta, ids, mask, labels))
