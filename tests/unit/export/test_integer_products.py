"""Products in integers, in ONNX Runtime and in torch, against their formula number by number."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from export.integer_products import IntegerProducts
from export.quantise import Stored, quantise
from export.stored_in_graphs import store
from export.to_onnx import convert, write_graphs
from export.trace import trace
from fedtt.errors import ConfigError

ROWS, IN, OUT = 7, 10, 12
AXES: dict[str, tuple[str, ...]] = {"x": ("rows",), "gradient": ("rows",)}

Floats = NDArray[np.float32]


class Layer(nn.Module):
    """x (T, N), gradient (T, M) of what the layer gives -> that, (T, M), and the gradient (T, N) of x."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(IN, OUT)
        generator = torch.Generator().manual_seed(0)
        for numbers in self.layer.parameters():
            numbers.data = torch.randn(numbers.shape, generator=generator)
        self.requires_grad_(False)

    def forward(self, x: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
        y, backward, *_ = torch.func.vjp(lambda x: F.linear(x, self.layer.weight, self.layer.bias), x)
        return y, backward(gradient)[0]


def by_rows(x: Floats, matrix: NDArray[np.int8]) -> NDArray[np.float64]:
    """Row by row, in Python's integers."""
    found = np.zeros((len(x), matrix.shape[1]))
    for t, row in enumerate(x):
        if step := float(np.abs(row).max()) / 127:
            whole = [round(float(value) / step) for value in row]
            columns = ([int(value) for value in column] for column in matrix.T)
            found[t] = [step * sum(a * b for a, b in zip(whole, c, strict=True)) for c in columns]
    return found


@pytest.fixture(scope="module")
def layer() -> tuple[Layer, dict[str, Stored]]:
    module = Layer()
    return module, quantise(module, "int8", multiplied={"layer.weight"})


@pytest.fixture(scope="module")
def session(
    layer: tuple[Layer, dict[str, Stored]], tmp_path_factory: pytest.TempPathFactory
) -> onnxruntime.InferenceSession:
    """With all that ONNX Runtime makes of a graph when it loads one."""
    module, stored = layer
    inputs = {"x": torch.randn(ROWS, IN), "gradient": torch.randn(ROWS, OUT)}
    outputs: dict[str, tuple[str, ...]] = {"y": ("rows",), "back": ("rows",)}
    graph = convert(trace(module, inputs, AXES), list(inputs), dict(module.named_parameters()), outputs, AXES)
    store(graph, stored)
    directory: Path = tmp_path_factory.mktemp("products")
    write_graphs({"layer.onnx": graph}, "layer.bin", directory)
    return onnxruntime.InferenceSession(directory / "layer.onnx", providers=["CPUExecutionProvider"])


def test_forward_and_backward_are_what_the_formula_says(
    layer: tuple[Layer, dict[str, Stored]], session: onnxruntime.InferenceSession
) -> None:
    module, stored = layer
    codes, bias = stored["layer.weight"].codes.numpy(), module.layer.bias.numpy()
    scale = np.abs(module.layer.weight.numpy()).max(1) / 64
    rng = np.random.default_rng(0)
    sizes = 10.0 ** np.arange(-12, 6, 3, dtype=np.float32)[:, None]  # each row has a step of its own
    x, gradient = (rng.normal(size=(6, n)).astype(np.float32) * sizes for n in (IN, OUT))
    x[3], gradient[3] = 0, 0
    y, back = by_rows(x, codes.T) * scale + bias, by_rows(gradient * scale, codes)
    in_graph = session.run(["y", "back"], {"x": x, "gradient": gradient})
    for found in (in_graph, _in_torch(layer, x, gradient)):
        for got, wanted in zip(found, (y, back), strict=True):
            assert (np.abs(got - wanted) <= 1e-5 * np.abs(wanted).max(1, keepdims=True)).all()


def _in_torch(layer: tuple[Layer, dict[str, Stored]], x: Floats, gradient: Floats) -> list[Floats]:
    module, stored = layer
    with IntegerProducts(dict(module.named_parameters()), stored):
        return [found.numpy() for found in module(torch.from_numpy(x), torch.from_numpy(gradient))]


def test_a_matrix_that_is_not_only_multiplied_with_is_named_and_what_to_do() -> None:
    class Odd(Layer):
        def forward(self, x: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
            y, back = super().forward(x, gradient)
            return y + self.layer.weight.sum(), back

    module = Odd()
    inputs = {"x": torch.randn(ROWS, IN), "gradient": torch.randn(ROWS, OUT)}
    outputs: dict[str, tuple[str, ...]] = {"y": ("rows",), "back": ("rows",)}
    graph = convert(trace(module, inputs, AXES), list(inputs), dict(module.named_parameters()), outputs, AXES)
    with pytest.raises(ConfigError, match=r"products = 'int8' is not allowed: fp32 for this model: layer"):
        store(graph, quantise(module, "int8", multiplied={"layer.weight"}))


class Mlp(nn.Module):
    """x (T, N), gradient (T, N) of a layer on gelu of a layer -> the gradient of x."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(IN, OUT), nn.Linear(OUT, IN)
        self.requires_grad_(False)

    def forward(self, x: Tensor, gradient: Tensor) -> Tensor:
        _, backward, *_ = torch.func.vjp(lambda x: self.down(F.gelu(self.up(x))), x)
        found: Tensor = backward(gradient)[0]
        return found


def test_products_that_follow_one_another_are_joined_and_give_the_same(tmp_path: Path) -> None:
    module = Mlp()
    stored = quantise(module, "int8", multiplied={"up.weight", "down.weight"})
    inputs = {"x": torch.randn(ROWS, IN), "gradient": 1e-3 * torch.randn(ROWS, IN)}
    inputs["gradient"][3] = 0
    axes: dict[str, tuple[str, ...]] = {"x": ("rows",), "gradient": ("rows",)}
    weights = dict(module.named_parameters())
    graph = convert(trace(module, inputs, axes), list(inputs), weights, {"back": ("rows",)}, axes)
    store(graph, stored)
    write_graphs({"mlp.onnx": graph}, "mlp.bin", tmp_path)
    session = onnxruntime.InferenceSession(tmp_path / "mlp.onnx", providers=["CPUExecutionProvider"])
    found = session.run(None, {name: value.numpy() for name, value in inputs.items()})[0]
    with IntegerProducts(weights, stored):
        torch.testing.assert_close(torch.from_numpy(found), module(*inputs.values()), atol=1e-9, rtol=1e-5)
    columns = [node.inputs[3] for node in graph.graph if node.op_type == "MatMulIntegerToFloat"]
    assert [value.name for value in columns if value] == [
        "up.weight.scale",
        "up.weight.scale",
        "quantise.one",
    ]


def test_pairs_of_products_fit_into_the_sixteen_bits_of_processors_without_vnni(
    layer: tuple[Layer, dict[str, Stored]],
) -> None:
    largest = int(layer[1]["layer.weight"].codes.abs().max())
    assert largest == 64
    assert 2 * 255 * largest < 2**15  # 255: of a row's unsigned numbers
