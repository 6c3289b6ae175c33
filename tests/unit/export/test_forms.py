from __future__ import annotations

import numpy as np
import torch

from export.forms import form_of, tt_halves
from export.registry import ARCHITECTURES
from fedtt.kinds import HeadOnly, LoraSB
from fedtt.tensor_train import TTMatrix, tt_dense
from tests.support.adapters import small_adapter


def test_batched_halves_multiply_to_the_dense_matrix_of_each_train() -> None:
    matrix = TTMatrix((4, 3), (2, 5), 3)
    numbers = np.random.default_rng(0).normal(size=(4, matrix.size))
    left, right = tt_halves(torch.from_numpy(numbers), matrix)
    ends = np.cumsum([a * b * c for a, b, c in matrix.core_shapes])[:-1]
    for n in range(4):
        cores = [p.reshape(s) for p, s in zip(np.split(numbers[n], ends), matrix.core_shapes, strict=True)]
        np.testing.assert_allclose(left[n] @ right[n], tt_dense(cores, matrix.split), rtol=1e-12)


def test_weights_come_module_by_module_in_the_order_of_the_layout() -> None:
    """So that the first pair of the second block stands after all pairs of the first."""
    spec = small_adapter("lora", hidden=8, layers=2, narrow=4)
    theta = torch.arange(spec.layout.size, dtype=torch.float32)
    form = form_of(spec.inserted)
    weights = form.weights(theta.reshape(spec.depth, -1))
    named = list(spec.layout.unflatten(theta.numpy()).values())
    assert len(form.paths(ARCHITECTURES["llama"])) * spec.depth == len(weights) == len(spec.lora_pairs)
    for (a, b), pair in zip(weights, spec.lora_pairs, strict=True):
        np.testing.assert_array_equal(a, named[pair.a])
        np.testing.assert_array_equal(b, named[pair.b])


def test_nothing_inserted_hooks_no_module() -> None:
    form = form_of(HeadOnly())
    assert form.paths(ARCHITECTURES["bert"]) == []
    assert form.weights(torch.zeros(0)) == []


def test_a_square_core_stands_between_the_two_frames() -> None:
    spec = small_adapter("lora-sb", hidden=8, layers=1, rank=3)
    assert isinstance(spec.inserted, LoraSB)
    theta = torch.from_numpy(np.random.default_rng(0).normal(size=spec.layout.size))
    form = form_of(spec.inserted)
    x = torch.from_numpy(np.random.default_rng(1).normal(size=(2, 5, 8)))
    named = [torch.from_numpy(part) for part in spec.layout.unflatten(theta.numpy()).values()]
    for core, weights in zip(spec.square_cores, form.weights(theta.reshape(1, -1)), strict=True):
        a, r, b = named[core - 1 : core + 2]
        expected = spec.inserted.scale * torch.einsum("nsi,qi,rq,or->nso", x, a, r, b)
        np.testing.assert_allclose(form.change(x, torch.zeros(2, 5, 8), *weights), expected, rtol=1e-10)
