from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from export.base import load_base
from export.devices import DevicesStep
from export.inputs import random_inputs
from export.prefix import Prefix
from export.request import TaskKind
from export.step import AdaptedModel, TrainingStep
from fedtt.kinds import AdapterKind, HeadKind
from tests.support.adapters import small_adapter
from tests.support.models import save_tiny_model

LABELS = ("alarm", "lights off", "pay", "weather")
SIZES = ((3, 9), (2, 12), (4, 5))  #: rows and tokens of each device's batch
WIDEST = 12


def _model(
    directory: Path, kind: AdapterKind, family: str = "bert", head: HeadKind | None = "label-names"
) -> AdaptedModel:
    task: TaskKind = "sequence-classification" if head else "causal-lm"
    base = load_base(str(save_tiny_model(directory, family)), task)
    narrow = base.projections["value"][1]
    spec = small_adapter(kind, hidden=32, layers=2, depth=1, head=head, narrow=narrow)
    return AdaptedModel(base, spec, LABELS if head else ())


def _batches(model: AdaptedModel) -> list[dict[str, Tensor]]:
    """Of three devices with different factors."""
    batches = [random_inputs(model, *size) for size in SIZES]
    return [{**batch, "theta": batch["theta"] * (1 + 0.2 * i)} for i, batch in enumerate(batches)]


def _together(batches: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The rows of all devices under one another, by the name of each input."""
    rows = {"theta": torch.stack([batch["theta"] for batch in batches])}
    for name in ("ids", "mask"):
        rows[name] = torch.cat([F.pad(b[name], (0, WIDEST - b[name].shape[1])) for b in batches])
    if "labels" in batches[0]:
        rows["labels"] = torch.cat([batch["labels"] for batch in batches])
        parts = [torch.full((len(b["ids"]),), 1 / len(b["ids"])) for b in batches]
    else:
        parts = [torch.full((len(b["ids"]),), 1 / float(b["mask"][:, 1:].sum())) for b in batches]
    rows["weight"] = torch.cat(parts)
    rows["device"] = torch.cat([torch.full((len(b["ids"]),), i) for i, b in enumerate(batches)])
    return rows


@torch.no_grad()
def _check(model: AdaptedModel, cut: int) -> None:
    """Each device's loss and gradient are those of its own training step."""
    batches = _batches(model)
    rows = _together(batches)
    if cut:
        rows["hidden"] = Prefix(model.base, cut)(rows["ids"], rows["mask"])
    step = DevicesStep(model, cut)
    losses, gradient = step(*(rows[name] for name in step.inputs))
    single = TrainingStep(model)
    for i, batch in enumerate(batches):
        loss, expected, _ = single(*batch.values())
        torch.testing.assert_close(losses[rows["device"] == i].sum(), loss)
        assert float((gradient[i] - expected).norm() / expected.norm()) < 2e-6


@pytest.mark.parametrize("kind", ["tt", "dense", "lora", "lora-sb"])
@pytest.mark.parametrize("cut", [0, 1])
def test_every_device_gets_the_gradient_of_its_own_step(kind: AdapterKind, cut: int, tmp_path: Path) -> None:
    _check(_model(tmp_path, kind), cut)


@pytest.mark.parametrize("head", ["tt", "dense"])
def test_every_head_is_each_devices_own(head: HeadKind, tmp_path: Path) -> None:
    _check(_model(tmp_path, "tt", head=head), 0)


@pytest.mark.parametrize("cut", [0, 1])
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2"])
def test_next_tokens_are_each_devices_own_too(family: str, cut: int, tmp_path: Path) -> None:
    _check(_model(tmp_path, "tt", family, head=None), cut)


def test_where_the_head_alone_is_trained_the_whole_base_is_below(tmp_path: Path) -> None:
    model = _model(tmp_path, "none")
    assert "ids" not in DevicesStep(model, cut=2).inputs
    _check(model, cut=2)


@torch.no_grad()
def test_the_gradients_of_rows_spread_over_passes_add_up(tmp_path: Path) -> None:
    model = _model(tmp_path, "tt")
    rows = _together(_batches(model))
    step = DevicesStep(model)

    def part(chosen: slice) -> Tensor:
        named = {name: value if name == "theta" else value[chosen] for name, value in rows.items()}
        gradient: Tensor = step(*(named[name] for name in step.inputs))[1]
        return gradient

    whole = part(slice(None))
    summed = part(slice(0, 4)) + part(slice(4, None))
    torch.testing.assert_close(summed, whole, rtol=1e-4, atol=1e-6)


@torch.no_grad()
def test_the_step_is_torchs_vmap_of_the_step_of_one_device(tmp_path: Path) -> None:
    model = _model(tmp_path, "lora")
    inputs = random_inputs(model, 6, 9)
    thetas = torch.linspace(0.5, 1.5, 3)[:, None] * inputs["theta"]

    def single(theta: Tensor, ids: Tensor, mask: Tensor, labels: Tensor) -> Tensor:
        gradient: Tensor = torch.func.grad(lambda t: model.loss(t, ids, mask, labels)[0])(theta)
        return gradient

    batch = [inputs[name].reshape(3, 2, *inputs[name].shape[1:]) for name in ("ids", "mask", "labels")]
    expected = torch.vmap(single)(thetas, *batch)
    rows = {
        **inputs,
        "theta": thetas,
        "device": torch.arange(3).repeat_interleave(2),
        "weight": torch.full((6,), 0.5),
    }
    step = DevicesStep(model)
    _, gradient = step(*(rows[name] for name in step.inputs))
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-6)
