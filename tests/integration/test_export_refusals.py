"""Models whose step does not compile: one line that names the graph, the operator and what to do."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from export.base import load_base
from export.executorch_graphs import executorch_graphs
from export.request import ExportRequest
from export.step import AdaptedModel
from fedtt.cli import main
from fedtt.errors import ConfigError
from tests.support.models import save_tiny_model

pytestmark = pytest.mark.slow

LABELS = ("alarm", "lights", "money", "weather")


class LogGamma(nn.Module):
    """ONNX has no such operator."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.lgamma(x.abs() + 1)


class Sorted(nn.Module):
    """ONNX has operators for it that no device of ours runs."""

    def forward(self, x: Tensor) -> Tensor:
        return x.sort(dim=-1).values


class Dependent(nn.Module):
    """Which way it takes depends on the data, which no trace can hold."""

    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


class SawTooth(nn.Module):
    """ONNX Runtime computes it on devices, ExecuTorch does not."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.fmod(x, 2.0)


def model_with(activation: type[nn.Module], directory: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A real BERT of two blocks whose MLPs have this between their layers."""
    monkeypatch.setitem(ACT2FN, "ours", activation)
    return save_tiny_model(directory, activation="ours")


@pytest.mark.parametrize(
    ("activation", "reason"),
    [
        (LogGamma, "has prims.lgamma (DispatchError: No ONNX function found"),
        (Sorted, "has TopK, which devices do not run: "),
        (Dependent, "cannot be traced or converted (GuardOnDataDependentSymNode: "),
    ],
)
def test_a_step_that_does_not_compile_to_onnx_is_one_line(
    activation: type[nn.Module],
    reason: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = model_with(activation, tmp_path / "model", monkeypatch)
    (tmp_path / "labels.json").write_text(json.dumps(LABELS))
    arguments = ["--labels", str(tmp_path / "labels.json"), "--max-tokens", "32", "--depths", ""]
    assert main(["export", str(model), *arguments, "--out", str(tmp_path / "bundle")]) == 2
    *_, said = capsys.readouterr().err.splitlines()
    assert said.startswith("fedtt: error: runtimes = 'onnxruntime' is not allowed: ")
    assert f"step.onnx {reason}" in said
    assert said.endswith(": choose another model, or another activation in its config.json")
    assert not (tmp_path / "bundle").exists()


@pytest.mark.parametrize(
    ("activation", "reason"),
    [
        (SawTooth, r"has aten::fmod\.\w+, which devices do not run"),
        (Dependent, r"cannot be traced or converted \(GuardOnDataDependentSymNode: .*\)"),
    ],
)
def test_a_step_that_cannot_be_lowered_is_one_line(
    activation: type[nn.Module], reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("executorch", reason="SKIPPED: executorch is not installed here")
    model = model_with(activation, tmp_path / "model", monkeypatch)
    base = load_base(str(model), "sequence-classification")
    request = ExportRequest(model=str(model), labels=LABELS, depths=(), max_tokens=32)
    spec = request.plan(hidden=base.hidden, layers=len(base.blocks), projections=base.projections)
    adapted = AdaptedModel(base, spec, LABELS)
    expected = (
        r"^runtimes = 'executorch' is not allowed: only for a model that compiles for it; "
        rf"step\.pte {reason}: export with --runtime onnxruntime, or choose another model$"
    )
    with pytest.raises(ConfigError, match=expected):
        executorch_graphs(adapted, (), 32, tmp_path, private=False)


def test_an_activation_with_numbers_of_its_own_in_bfloat16_loads_in_float32(tmp_path: Path) -> None:
    """xIELU's are so in transformers, whatever the model is loaded in."""
    base = load_base(str(save_tiny_model(tmp_path, activation="xielu")), "sequence-classification")
    found = {value.dtype for _, value in base.model.named_parameters()}
    assert found == {torch.float32}
    assert len(base.sha256) == 64
