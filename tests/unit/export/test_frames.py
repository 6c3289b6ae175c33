from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from export.base import load_base
from export.frames import frames
from export.insert import Adapters
from fedtt.errors import ConfigError
from tests.support.adapters import small_adapter


def layer(weight: np.ndarray) -> nn.Linear:
    found = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    found.weight = nn.Parameter(torch.from_numpy(weight.astype(np.float32)), requires_grad=False)
    return found


def drawn(d_out: int, d_in: int, seed: int = 0) -> nn.Linear:
    return layer(np.random.default_rng(seed).normal(size=(d_out, d_in)))


@pytest.mark.parametrize(("d_out", "d_in", "rank"), [(24, 40, 5), (40, 24, 24), (1, 7, 1)])
def test_they_keep_the_leading_part_of_the_weight_and_nothing_else(d_out: int, d_in: int, rank: int) -> None:
    """W as its best approximation of rank r, from eigenvectors of W Wᵀ and not from an SVD."""
    module = drawn(d_out, d_in)
    weight = module.weight.numpy().astype(np.float64)
    a, b = (frame.numpy().astype(np.float64) for frame in frames(module, rank))
    assert (a.shape, b.shape) == ((rank, d_in), (d_out, rank))
    np.testing.assert_allclose(a @ a.T, np.eye(rank), atol=2e-3)
    np.testing.assert_allclose(b.T @ b, np.eye(rank), atol=2e-3)
    vectors = np.linalg.eigh(weight @ weight.T)[1][:, ::-1][:, :rank]
    middle = b.T @ weight @ a.T
    np.testing.assert_allclose(b @ middle @ a, vectors @ vectors.T @ weight, atol=2e-2)
    assert (np.diff(np.diag(middle)) <= 0).all()
    assert (np.diag(middle) > 0).all()
    assert (b[np.abs(b).argmax(0), range(rank)] > 0).all()


def test_a_weight_that_other_linear_algebra_would_give_other_bits_for_has_the_same_frames() -> None:
    """Noise of a float64's rounding, which is what machines differ by."""
    weight = np.random.default_rng(0).normal(size=(48, 48))
    plain = nn.Linear(48, 48, dtype=torch.float64)
    moved = nn.Linear(48, 48, dtype=torch.float64)
    plain.weight.data = torch.from_numpy(weight)
    moved.weight.data = torch.from_numpy(
        weight * (1 + 4e-16 * np.random.default_rng(1).normal(size=(48, 48)))
    )
    for one, other in zip(frames(plain, 8), frames(moved, 8), strict=True):
        assert torch.equal(one, other)


def test_a_smaller_rank_has_the_first_of_a_larger_one() -> None:
    module = drawn(16, 16)
    (a, b), (a_small, b_small) = frames(module, 6), frames(module, 2)
    assert torch.equal(a[:2], a_small)
    assert torch.equal(b[:, :2], b_small)


def test_they_are_the_base_s_and_change_neither_its_hash_nor_its_state(tiny_model: Path) -> None:
    base, bare = (load_base(str(tiny_model), "sequence-classification") for _ in range(2))
    spec = small_adapter("lora-sb", hidden=base.hidden, layers=2, rank=3)
    Adapters(base, spec)
    module = base.blocks[1].get_submodule(base.architecture.query)
    assert frames(module, 3)[0] is frames(module, 3)[0]
    assert base.sha256 == bare.sha256
    assert base.model.state_dict().keys() == bare.model.state_dict().keys()


@pytest.mark.parametrize(
    ("values", "allowed"), [((3.0, 2.0, 2.0, 1.0), "at most 1,"), ((3.0, 2.0, 0.0, 0.0), "at most 2,")]
)
def test_directions_that_the_weight_does_not_tell_apart_are_refused(
    values: tuple[float, ...], allowed: str
) -> None:
    orthogonal = np.linalg.qr(np.random.default_rng(0).normal(size=(4, 4)))[0]
    with pytest.raises(ConfigError, match=f"adapter.rank = 3 .*{allowed}"):
        frames(layer(orthogonal * values), 3)


def test_more_than_the_weight_has_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"adapter.rank = 5 .*1 to 4"):
        frames(drawn(4, 9), 5)
