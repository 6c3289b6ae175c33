from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from export.base import Base, load_base
from export.frames import frames
from export.insert import Adapters
from fedtt.adapter import AdapterSpec, initial_theta
from fedtt.kinds import AdapterKind, Lora, LoraSB, TTBottleneck
from fedtt.layout import Theta
from fedtt.ranks import embedding
from fedtt.tensor_train import tt_dense
from tests.support.adapters import small_adapter
from tests.support.models import save_tiny_model

IDS = torch.tensor([[1, 9, 10, 2], [1, 12, 2, 0]])
MASK = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])
INSERTED: tuple[AdapterKind, ...] = ("tt", "dense", "lora", "lora-sb")


def _base(directory: Path, family: str = "bert") -> Base:
    return load_base(str(save_tiny_model(directory, family)), "sequence-classification")


def _spec(base: Base, kind: AdapterKind, depth: int = 2, rank: int = 3) -> AdapterSpec:
    narrow = base.projections["value"][1]
    return small_adapter(kind, hidden=base.hidden, layers=2, depth=depth, rank=rank, narrow=narrow)


def _random(spec: AdapterSpec) -> Theta:
    return np.random.default_rng(0).normal(0, 0.5, spec.layout.size).astype(np.float32)


@pytest.mark.parametrize("kind", INSERTED)
@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert", "llama", "mistral", "qwen2"])
def test_adapters_at_their_first_values_leave_every_hidden_state_as_it_was(
    family: str, kind: AdapterKind, tmp_path: Path
) -> None:
    base = _base(tmp_path, family)
    spec = _spec(base, kind)
    adapters = Adapters(base, spec)
    with torch.no_grad():
        bare = base.run(IDS, MASK)
        with adapters.holding(torch.from_numpy(initial_theta(spec, seed=3))):
            adapted = base.run(IDS, MASK)
    assert torch.equal(bare, adapted)


@pytest.mark.parametrize("kind", INSERTED)
@pytest.mark.parametrize("family", ["bert", "distilbert", "llama"])
def test_adapters_compute_what_their_papers_say_with_dense_matrices(
    family: str, kind: AdapterKind, tmp_path: Path
) -> None:
    base = _base(tmp_path, family)
    spec = _spec(base, kind, depth=1)
    theta = _random(spec)
    bare = base.run(IDS, MASK)
    with Adapters(base, spec).holding(torch.from_numpy(theta)):
        found = base.run(IDS, MASK)
    _insert_slowly(base, spec, theta)
    expected = base.run(IDS, MASK)
    assert not torch.allclose(found, bare, atol=0.1)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def _insert_slowly(base: Base, spec: AdapterSpec, theta: Theta) -> None:
    """The slow way: dense matrices for each name in the layout, found by name, in the last block."""
    block, paths = base.blocks[1], {"attention": base.architecture.attention, "mlp": base.architecture.mlp}
    if isinstance(spec.inserted, Lora | LoraSB):
        for name, path in (("query", base.architecture.query), ("value", base.architecture.value)):
            module = block.get_submodule(path)
            assert isinstance(module, nn.Linear)
            if isinstance(spec.inserted, LoraSB):
                a, b = frames(module, spec.inserted.rank)
                b = b @ _matrix(spec, theta, f"{name}.lora_r")
            else:
                a, b = (_matrix(spec, theta, f"{name}.lora_{letter}") for letter in "ab")
            module.weight.add_(spec.inserted.alpha / spec.inserted.rank * b @ a)
        return
    for site, path in paths.items():
        _add_bottleneck(
            block.get_submodule(path), *(_matrix(spec, theta, f"{site}.{m}") for m in ("down", "up"))
        )


def _add_bottleneck(module: nn.Module, down: Tensor, up: Tensor) -> None:
    module.register_forward_hook(lambda _module, _inputs, h: h + F.gelu(h @ down) @ up)


def _matrix(spec: AdapterSpec, theta: Theta, name: str) -> Tensor:
    """One matrix of the last block by its name, a TT matrix as a dense one."""
    named = {key.removeprefix("block.1."): value for key, value in spec.layout.unflatten(theta).items()}
    if name in named:
        return torch.from_numpy(named[name])
    assert isinstance(spec.inserted, TTBottleneck)
    train = spec.inserted.up if name.endswith("up") else spec.inserted.down
    cores = [named[f"{name}.{k}"] for k in range(len(train.modes))]
    return torch.from_numpy(np.array(tt_dense(cores, train.split)))


def test_lora_fits_the_narrower_values_of_grouped_queries(tmp_path: Path) -> None:
    base = _base(tmp_path, "llama")
    assert base.projections["value"] == (32, 16)  # 2 of 4 heads of 8
    assert base.projections["query"] == base.projections["output"] == (32, 32)


@pytest.mark.parametrize("kind", ["tt", "lora"])
def test_a_smaller_rank_embedded_in_a_larger_one_is_the_same_function_with_the_same_gradient(
    kind: AdapterKind, tmp_path: Path
) -> None:
    base = _base(tmp_path, "llama")
    large = _spec(base, kind, rank=4)
    small = large.at_rank(2)
    theta = _random(small)
    positions = embedding(small, large)
    padded = np.zeros(large.layout.size, np.float32)
    padded[positions] = theta

    def run(spec: AdapterSpec, numbers: Theta) -> tuple[Tensor, Tensor]:
        leaf = torch.from_numpy(numbers).requires_grad_()
        adapters = Adapters(base, spec)
        with adapters.holding(leaf):
            output = base.run(IDS, MASK)
        adapters.remove()
        (gradient,) = torch.autograd.grad(output.square().mean(), leaf)
        return output.detach(), gradient

    expected, expected_gradient = run(small, theta)
    found, gradient = run(large, padded)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(gradient[positions], expected_gradient, rtol=1e-4, atol=1e-6)
    assert expected_gradient.count_nonzero() == small.layout.size


@pytest.mark.parametrize("kind", INSERTED)
def test_the_base_is_bare_again_after_an_error_inside_the_block(kind: AdapterKind, tiny_model: Path) -> None:
    base = load_base(str(tiny_model), "sequence-classification")
    spec = _spec(base, kind)
    adapters = Adapters(base, spec)
    bare = base.run(IDS, MASK)
    with pytest.raises(ZeroDivisionError), adapters.holding(torch.ones(spec.layout.size)):
        raise ZeroDivisionError
    assert torch.equal(base.run(IDS, MASK), bare)


@pytest.mark.parametrize("kind", INSERTED)
def test_only_the_last_blocks_are_adapted_where_the_depth_is_less(
    kind: AdapterKind, tiny_model: Path
) -> None:
    base = load_base(str(tiny_model), "sequence-classification")
    spec = _spec(base, kind, depth=1)
    outputs: list[list[Tensor]] = [[], []]
    for block, seen in zip(base.blocks, outputs, strict=True):
        block.register_forward_hook(lambda _m, _i, out, seen=seen: seen.append(out))
    base.run(IDS, MASK)
    with Adapters(base, spec).holding(torch.ones(spec.layout.size)):
        base.run(IDS, MASK)
    (bare, adapted), (bare_last, adapted_last) = outputs
    assert torch.equal(bare, adapted)
    assert not torch.equal(bare_last, adapted_last)


def test_removed_adapters_change_nothing_any_more(tiny_model: Path) -> None:
    base = load_base(str(tiny_model), "sequence-classification")
    spec = _spec(base, "lora")
    bare = base.run(IDS, MASK)
    adapters = Adapters(base, spec)
    adapters.hold(torch.ones(spec.layout.size))
    assert not torch.equal(base.run(IDS, MASK), bare)
    adapters.remove()
    assert torch.equal(base.run(IDS, MASK), bare)
