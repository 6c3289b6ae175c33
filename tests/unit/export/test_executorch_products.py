"""Products in integers in ExecuTorch and in torch, against their formula number by number."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from export.integer_products import IntegerProducts, by_range
from export.quantise import Stored, quantise
from export.trace import trace
from fedtt.errors import ConfigError

pytestmark = pytest.mark.slow

ROWS, IN, OUT = 7, 10, 12
AXES: dict[str, tuple[str, ...]] = {"x": ("rows",), "gradient": ("rows",)}
NAMES = ("key.weight", "query.weight")

Floats = NDArray[np.float32]


class Layers(nn.Module):
    """x (T, N), gradient (T, M) -> what two layers give of x, (T, M), and what the first gives back, (T, N).

    The second has no bias; before it stands what products need, too, a vector of ones.
    """

    def __init__(self) -> None:
        super().__init__()
        self.key, self.query = nn.Linear(IN, OUT), nn.Linear(IN, OUT, bias=False)
        generator = torch.Generator().manual_seed(0)
        for numbers in self.parameters():
            numbers.data = torch.randn(numbers.shape, generator=generator)
        self.ones = nn.Parameter(torch.ones(IN))
        self.requires_grad_(False)

    def forward(self, x: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y, backward, *_ = torch.func.vjp(lambda x: F.linear(x, self.key.weight, self.key.bias), x)
        return y, F.linear(x * self.ones, self.query.weight), backward(gradient)[0]


def by_rows(x: Floats, matrix: NDArray[np.int8]) -> NDArray[np.float64]:
    """Row by row, in Python's integers: 255 steps from the least to the largest, 0 among them."""
    found = np.zeros((len(x), matrix.shape[1]))
    for t, row in enumerate(x.astype(float)):
        low, high = min(0.0, *row), max(0.0, *row)
        if step := (high - low) / 255:
            zero = -128 - round(low / step)
            whole = [min(127, zero + round(value / step)) - zero for value in row]
            columns = ([int(value) for value in column] for column in matrix.T)
            found[t] = [step * sum(a * b for a, b in zip(whole, c, strict=True)) for c in columns]
    return found


@pytest.fixture(scope="module")
def layers() -> tuple[Layers, dict[str, Stored]]:
    module = Layers()
    return module, quantise(module, "int8", multiplied=NAMES)


@pytest.fixture(scope="module")
def lowered(layers: tuple[Layers, dict[str, Stored]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("executorch.exir", reason="SKIPPED: executorch is not installed, nothing is lowered")
    from export.to_executorch import write_programs

    module, stored = layers
    inputs = {"x": torch.randn(ROWS, IN), "gradient": torch.randn(ROWS, OUT)}
    directory = tmp_path_factory.mktemp("products")
    known = {module.get_parameter(name).data_ptr(): kept for name, kept in stored.items()}
    write_programs([("layers.pte", trace(module, inputs, AXES, {"rows": 16}))], "base.ptd", directory, known)
    return directory


def test_forward_and_backward_are_what_the_formula_says(
    layers: tuple[Layers, dict[str, Stored]], lowered: Path
) -> None:
    with warnings.catch_warnings():  # it calls itself experimental
        warnings.simplefilter("ignore")
        from executorch.extension.pybindings.portable_lib import _load_for_executorch

    module, stored = layers
    key, query = (stored[name].codes.numpy() for name in NAMES)
    key_scale, query_scale = (np.abs(module.get_parameter(n).numpy()).max(1) / 64 for n in NAMES)
    rng = np.random.default_rng(0)
    sizes = 10.0 ** np.arange(-12, 6, 3, dtype=np.float32)[:, None]  # each row has steps of its own
    x, gradient = (rng.normal(size=(6, n)).astype(np.float32) * sizes for n in (IN, OUT))
    x[3], gradient[3], x[4], gradient[5] = 0, 0, np.abs(x[4]), -np.abs(gradient[5])
    wanted = (
        by_rows(x, key.T) * key_scale + module.key.bias.numpy(),
        by_rows(x, query.T) * query_scale,
        by_rows(gradient * key_scale, key),
    )
    program = _load_for_executorch(str(lowered / "layers.pte"), str(lowered / "base.ptd"))
    inputs = (torch.from_numpy(x), torch.from_numpy(gradient))
    with IntegerProducts(dict(module.named_parameters()), stored, by_range):
        in_torch = module(*inputs)
    for found in (program.forward(list(inputs)), in_torch):
        for got, want in zip(found, wanted, strict=True):
            assert (np.abs(got.numpy() - want) <= 1e-5 * np.abs(want).max(1, keepdims=True)).all()


def test_the_file_holds_the_integers_of_a_matrix_once(
    layers: tuple[Layers, dict[str, Stored]], lowered: Path
) -> None:
    """Forward and backward read the same bytes, and no program has them, too."""
    module, stored = layers
    data, program = ((lowered / name).read_bytes() for name in ("base.ptd", "layers.pte"))
    for name in NAMES:
        codes = stored[name].codes.numpy().tobytes()
        assert (data.count(codes), program.count(codes)) == (1, 0)
        assert module.get_parameter(name).numpy().tobytes() not in data


def test_a_matrix_that_is_not_only_multiplied_with_is_named_and_what_to_do(tmp_path: Path) -> None:
    pytest.importorskip("executorch.exir", reason="SKIPPED: executorch is not installed, nothing is lowered")
    from export.to_executorch import write_programs

    class Odd(Layers):
        def forward(self, x: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            y, z, back = super().forward(x, gradient)
            return y + self.key.weight.sum(), z, back

    module = Odd()
    inputs = {"x": torch.randn(ROWS, IN), "gradient": torch.randn(ROWS, OUT)}
    stored = quantise(module, "int8", multiplied=NAMES)
    known = {module.get_parameter(name).data_ptr(): kept for name, kept in stored.items()}
    program = trace(module, inputs, AXES, {"rows": 16})
    with pytest.raises(ConfigError, match=r"products = 'int8' is not allowed: fp32 for this model: "):
        write_programs([("odd.pte", program)], "base.ptd", tmp_path, known)
