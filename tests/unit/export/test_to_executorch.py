"""Lowered programs compute what torch does, from a base stored in any precision or multiplied in integers."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from export.forms import LoraSBForm
from export.integer_products import IntegerProducts, by_range
from export.quantise import Stored, quantise
from export.trace import trace
from fedtt.kinds import LoraSB, LoraTarget
from fedtt.manifest import Precision

pytestmark = pytest.mark.slow

WIDTH, WORDS, LONGEST, RANK = 16, 40, 32, 3
NUMBERS = 2 * WIDTH + RANK**2
AXES: dict[str, tuple[str, ...]] = {"theta": (), "ids": ("batch", "tokens")}


class Model(nn.Module):
    """The gradient of what is written otherwise: an embedding, W and its transpose, gelu, a thin matrix.

    And of a square core between the frames of W.
    """

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words, self.dense = nn.Embedding(WORDS, WIDTH), nn.Linear(WIDTH, 2 * WIDTH)
        self.requires_grad_(False)
        target = LoraTarget(name="query", d_in=WIDTH, d_out=2 * WIDTH)
        self.form = LoraSBForm(LoraSB(rank=RANK, alpha=RANK, targets=(target,)))
        self.form.fixed(self.dense)

    def forward(self, theta: Tensor, ids: Tensor) -> Tensor:
        def loss(theta: Tensor) -> Tensor:
            words = self.words(ids)
            thin, core = torch.split(theta, [2 * WIDTH, RANK**2])
            moved = (words.reshape(-1, WIDTH) @ thin.reshape(WIDTH, 2)) @ thin.reshape(2, WIDTH)
            x = words + moved.reshape(words.shape)
            y = self.dense(x)
            ((weight,),) = self.form.weights(core.reshape(1, -1))
            hidden = F.gelu(y + self.form.change(x, y, weight, *self.form.fixed(self.dense)))
            return torch.softmax(hidden.transpose(1, 2), -1).square().sum() + hidden.square().mean()

        gradient: Tensor = torch.func.grad(loss)(theta)
        return gradient


@pytest.fixture(scope="module", params=["fp32", "fp16", "int8", "int8-products"])
def lowered(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Model, dict[str, Stored], Path]:
    pytest.importorskip("executorch.exir", reason="SKIPPED: executorch is not installed, nothing is lowered")
    from export.to_executorch import write_programs

    model, directory = Model(), tmp_path_factory.mktemp(request.param)
    precision: Precision = request.param.removesuffix("-products")
    multiplied = ["dense.weight"] if request.param == "int8-products" else []
    stored = quantise(model, precision, multiplied)
    inputs = {"theta": torch.zeros(NUMBERS), "ids": torch.zeros((3, 10), dtype=torch.int64)}
    program = trace(model, inputs, AXES, {"batch": 8, "tokens": LONGEST})
    known = {model.get_parameter(name).data_ptr(): kept for name, kept in stored.items()}
    write_programs([("step.pte", program)], "base.ptd", directory, known)
    return model, stored, directory


@pytest.mark.parametrize(("rows", "tokens"), [(1, 3), (3, 10), (8, LONGEST)])
def test_a_program_gives_the_gradient_of_torch_over_the_rounded_base(
    rows: int, tokens: int, lowered: tuple[Model, dict[str, Stored], Path]
) -> None:
    with warnings.catch_warnings():  # it calls itself experimental
        warnings.simplefilter("ignore")
        from executorch.extension.pybindings.portable_lib import _load_for_executorch

    model, stored, directory = lowered
    generator = torch.Generator().manual_seed(rows)
    theta = torch.randn(NUMBERS, generator=generator)
    ids = torch.randint(WORDS, (rows, tokens), generator=generator)
    with IntegerProducts(dict(model.named_parameters()), stored, by_range):
        expected = model(theta, ids)
    program = _load_for_executorch(str(directory / "step.pte"), str(directory / "base.ptd"))
    (found,) = program.forward([theta, ids])
    turned = any(
        kept.multiplied for kept in stored.values()
    )  # now and then a number is rounded the other way
    assert (found - expected).norm() <= (1e-2 if turned else 1e-5) * expected.norm()


def test_a_matrix_lies_in_the_file_as_it_is_stored_alone(
    lowered: tuple[Model, dict[str, Stored], Path],
) -> None:
    model, _, directory = lowered
    data = (directory / "base.ptd").read_bytes()
    for weight in (model.words.weight, model.dense.weight):
        stored = directory.name.startswith("fp32")
        assert (weight.numpy().tobytes() in data) == stored
    for whole in (model.dense.bias, *model.form.fixed(model.dense)):
        assert whole.numpy().tobytes() in data


def test_a_matrix_is_computed_right_before_the_call_that_reads_it(
    lowered: tuple[Model, dict[str, Stored], Path],
) -> None:
    """Forward and backward each anew, and it lies in memory for that call alone."""
    from executorch.exir._serialize._program import deserialize_pte_binary

    _, stored, directory = lowered
    plan = deserialize_pte_binary((directory / "step.pte").read_bytes()).program.execution_plan[0]
    calls = [list(instruction.instr_args.args) for instruction in plan.chains[0].instructions]
    computed = [
        index
        for index, value in enumerate(plan.values)
        if getattr(value.val, "sizes", None) == [2 * WIDTH, WIDTH] and value.val.allocation_info is not None
    ]
    kept = stored.get("dense.weight")
    steps = 0 if kept is None or kept.multiplied else 1 if kept.scale is None else 2
    assert len(computed) == 2 * steps
    for index in computed:
        used = [place for place, args in enumerate(calls) if index in args]
        assert used[-1] - used[0] <= 3  # one call may read two
