from __future__ import annotations

import numpy as np
import torch
from torch import nn

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


def test_a_square_core_stands_between_the_two_frames_of_the_frozen_weight() -> None:
    spec = small_adapter("lora-sb", hidden=8, layers=2, rank=3, narrow=4)
    assert isinstance(spec.inserted, LoraSB)
    rng, form = np.random.default_rng(0), form_of(spec.inserted)
    theta, x = rng.normal(size=spec.layout.size), rng.normal(size=(2, 5, 8))
    module = nn.Linear(8, 4, dtype=torch.float64)
    module.weight = nn.Parameter(torch.from_numpy(rng.normal(size=(4, 8))))
    u, _, vt = np.linalg.svd(module.weight.detach().numpy())
    signs = np.sign(u[np.abs(u).argmax(0), range(4)])[:3]
    cores = spec.layout.unflatten(theta.astype(np.float32)).values()
    for core, weights in zip(cores, form.weights(torch.from_numpy(theta).reshape(2, -1)), strict=True):
        for rows in (1.0, np.array([1.0, 2.0])[:, None, None]):  # one core for all rows, or each row's own
            matrix = (u[:, :3] * signs) @ (rows * core) @ (vt[:3].T * signs).T
            expected = spec.inserted.scale * x @ np.swapaxes(matrix, -1, -2)
            given = (weights[0] * torch.as_tensor(rows),)
            found = form.change(torch.from_numpy(x), torch.zeros(2, 5, 4), *given, *form.fixed(module))
            np.testing.assert_allclose(found, expected, atol=5e-3)
