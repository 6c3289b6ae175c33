"""What each kind of adapter computes at a module of the base, and how it reads its numbers from theta."""

from __future__ import annotations

import math
from collections.abc import Iterable
from itertools import chain
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedtt.kinds import DenseBottleneck, HeadOnly, Inserted, Lora, LoraSB, TTBottleneck
from fedtt.tensor_train import TTMatrix

from .frames import frames
from .registry import Architecture

__all__ = ["Form", "LoraSBForm", "Weights", "flat", "form_of", "times", "tt_halves"]

Weights = tuple[Tensor, ...]  #: of one adapted module


class Form(Protocol):
    """One kind of adapter."""

    @property
    def reads_input(self) -> bool:
        """Whether `change` reads x: else what is below a module's output is frozen as long as y is."""
        ...

    def paths(self, architecture: Architecture) -> list[str]:
        """The modules of a block that it changes, in the order of the layout."""
        ...

    def weights(self, numbers: Tensor) -> list[Weights]:
        """numbers (..., blocks, numbers of one block) -> the weights of every changed module, block by block.

        All of one shape are made by one product, which keeps the graph of a deep model small. Dimensions
        before the blocks stay in front of each weight's own.
        """
        ...

    def fixed(self, module: nn.Module) -> Weights:
        """What `change` is given beside the weights: matrices that the frozen module itself fixes."""
        return ()

    def change(self, x: Tensor, y: Tensor, *weights: Tensor) -> Tensor:
        """What is added to a module's output y (N, S, d_out), x (N, S, d_in) being its input.

        Each weight serves all N rows, or has N in front: then each row has its own. What is fixed follows
        them, and serves all rows.
        """
        ...


def form_of(inserted: Inserted) -> Form:
    match inserted:
        case TTBottleneck():
            return TTForm(inserted)
        case DenseBottleneck():
            return DenseForm(inserted)
        case Lora():
            return LoraForm(inserted)
        case LoraSB():
            return LoraSBForm(inserted)
        case HeadOnly():
            return NoForm()


def _target_paths(inserted: Lora | LoraSB, architecture: Architecture) -> list[str]:
    return [architecture.projections[target.name] for target in inserted.targets]


def _bottleneck_paths(inserted: TTBottleneck | DenseBottleneck, architecture: Architecture) -> list[str]:
    paths = {"attention": architecture.attention, "mlp": architecture.mlp}
    return [paths[site] for site in inserted.sites]


class TTForm(Form):
    """up(gelu(down(y))), each matrix as two thin products: LoRETTA, arXiv 2402.11417, eq. 4."""

    reads_input = False

    def __init__(self, inserted: TTBottleneck) -> None:
        self._inserted = inserted

    def paths(self, architecture: Architecture) -> list[str]:
        return _bottleneck_paths(self._inserted, architecture)

    def weights(self, numbers: Tensor) -> list[Weights]:
        """The halves of down, (H, r) and (r, b), and of up, (b, r) and (r, H)."""
        down, up = self._inserted.down, self._inserted.up
        downs, ups = torch.split(numbers.reshape(-1, down.size + up.size), [down.size, up.size], dim=1)
        lead = (*numbers.shape[:-2], numbers.shape[-2] * len(self._inserted.sites))
        halves = (*tt_halves(downs, down), *tt_halves(ups, up))
        return _by_module(half.reshape(*lead, *half.shape[1:]) for half in halves)

    def change(self, x: Tensor, y: Tensor, *weights: Tensor) -> Tensor:
        down_left, down_right, up_left, up_right = weights
        narrow = F.gelu(times(times(flat(y, down_left), down_left), down_right))
        return times(times(narrow, up_left), up_right).reshape(y.shape)


class DenseForm(Form):
    """up(gelu(down(y))) with plain matrices: Houlsby et al. 2019, arXiv 1902.00751, §2.1."""

    reads_input = False

    def __init__(self, inserted: DenseBottleneck) -> None:
        self._inserted = inserted

    def paths(self, architecture: Architecture) -> list[str]:
        return _bottleneck_paths(self._inserted, architecture)

    def weights(self, numbers: Tensor) -> list[Weights]:
        """down (H, b) and up (b, H)."""
        h, b = self._inserted.hidden, self._inserted.bottleneck
        lead = (*numbers.shape[:-2], numbers.shape[-2] * len(self._inserted.sites))
        downs, ups = torch.split(numbers.reshape(*lead, 2 * h * b), [h * b, h * b], dim=-1)
        return _by_module([downs.reshape(*lead, h, b), ups.reshape(*lead, b, h)])

    def change(self, x: Tensor, y: Tensor, *weights: Tensor) -> Tensor:
        down, up = weights
        return times(F.gelu(times(flat(y, down), down)), up).reshape(y.shape)


class LoraForm(Form):
    """(α / r) B A x beside a projection: Hu et al. 2022, arXiv 2106.09685, eq. 3."""

    reads_input = True

    def __init__(self, inserted: Lora) -> None:
        self._inserted = inserted

    def paths(self, architecture: Architecture) -> list[str]:
        return _target_paths(self._inserted, architecture)

    def weights(self, numbers: Tensor) -> list[Weights]:
        """A (r, d_in) and B (d_out, r)."""
        shapes = [factor.shape for part in self._inserted.parts for factor in part.factors]
        parts = torch.split(numbers, [math.prod(shape) for shape in shapes], dim=-1)
        lead = numbers.shape[:-1]
        factors = [part.reshape(*lead, *shape) for part, shape in zip(parts, shapes, strict=True)]
        each = len(factors) // len(self._inserted.targets)
        found = [_by_module(factors[i : i + each]) for i in range(0, len(factors), each)]
        return list(chain.from_iterable(zip(*found, strict=True)))  # from by target to by block

    def change(self, x: Tensor, y: Tensor, *weights: Tensor) -> Tensor:
        product = flat(x, weights[0])
        for weight in weights:
            product = times(product, weight.mT)
        return (product * self._inserted.scale).reshape(y.shape)


class LoraSBForm(Form):
    """(α / r) B R A x beside a projection, A and B being `frames` of its frozen weight: `kinds.LoraSB`."""

    reads_input = True

    def __init__(self, inserted: LoraSB) -> None:
        self._inserted = inserted

    def paths(self, architecture: Architecture) -> list[str]:
        return _target_paths(self._inserted, architecture)

    def weights(self, numbers: Tensor) -> list[Weights]:
        """R (r, r)."""
        rank, modules = self._inserted.rank, numbers.shape[-2] * len(self._inserted.targets)
        return _by_module([numbers.reshape(*numbers.shape[:-2], modules, rank, rank)])

    def fixed(self, module: nn.Module) -> Weights:
        """A (r, d_in) and B (d_out, r)."""
        return frames(module, self._inserted.rank)

    def change(self, x: Tensor, y: Tensor, *weights: Tensor) -> Tensor:
        core, a, b = weights
        narrow = times(flat(x, a), a.mT)
        if core.dim() > 2:
            narrow = narrow.reshape(*x.shape[:-1], narrow.shape[-1])
        turned = times(narrow, core.mT) * self._inserted.scale
        return times(flat(turned, b), b.mT).reshape(y.shape)


class NoForm(Form):
    """No module is changed."""

    reads_input = False

    def paths(self, architecture: Architecture) -> list[str]:
        return []

    def weights(self, numbers: Tensor) -> list[Weights]:
        return []

    def change(self, x: Tensor, y: Tensor, *weights: Tensor) -> Tensor:
        return torch.zeros_like(y)


def _by_module(stacked: Iterable[Tensor]) -> list[Weights]:
    """Tensors (..., modules, a, b) -> for each module its tensors (..., a, b)."""
    return list(zip(*(tensor.unbind(-3) for tensor in stacked), strict=True))


def flat(x: Tensor, weight: Tensor) -> Tensor:
    """x (N, ..., a) as `times` takes it: all its vectors below one another, or those of each row."""
    return x.reshape(*x.shape[: weight.dim() - 2], -1, x.shape[-1])


def times(x: Tensor, weight: Tensor) -> Tensor:
    """x (V, a) by one weight (a, b), or x (N, V, a) by each row's own (N, a, b).

    As products of two and three dimensions: others lose dynamic sizes when traced.
    """
    return torch.mm(x, weight) if weight.dim() == 2 else torch.bmm(x, weight)


def tt_halves(numbers: Tensor, matrix: TTMatrix) -> tuple[Tensor, Tensor]:
    """The thin factors of n TT matrices at once, W = L R as in `fedtt.tensor_train`.

    numbers: (n, matrix.size), the cores of each matrix one after another.  Returns L (n, d_in, r) and
    R (n, r, d_out).
    """
    n, shapes = numbers.shape[0], matrix.core_shapes
    parts = torch.split(numbers, [r0 * m * r1 for r0, m, r1 in shapes], dim=1)
    cores = [part.reshape(n, *shape) for part, shape in zip(parts, shapes, strict=True)]
    left = cores[0].reshape(n, *cores[0].shape[2:])
    for core in cores[1 : matrix.split]:
        left = torch.bmm(left, core.reshape(n, core.shape[1], -1)).reshape(n, -1, core.shape[3])
    right = cores[-1].reshape(n, *cores[-1].shape[1:3])
    for core in reversed(cores[matrix.split : -1]):
        right = torch.bmm(core.reshape(n, -1, core.shape[3]), right).reshape(n, core.shape[1], -1)
    return left, right
