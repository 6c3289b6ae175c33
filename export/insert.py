"""TT adapters as forward hooks: any transformers model is adapted without a change to its code.

h + up(gelu(down(h))) on the output h of each site: LoRETTA (Yang et al., NAACL 2024, arXiv 2402.11417,
eq. 4), at the sites of FedTT (Ghiasvand et al., arXiv 2410.13097, §3).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedtt.adapter import AdapterSpec
from fedtt.tensor_train import TTMatrix

from .base import Base

__all__ = ["TTAdapters", "tt_halves"]


def tt_halves(numbers: Tensor, matrix: TTMatrix) -> tuple[Tensor, Tensor]:
    """The thin factors of n TT matrices at once, W = L R as in `fedtt.tensor_train`.

    numbers: (n, matrix.size), the cores of each matrix one after another.  Returns L (n, d_in, r) and
    R (n, r, d_out). One batched product for all matrices keeps the graph of a deep model as small as
    that of a single adapter.
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


Thin = tuple[Tensor, Tensor, Tensor, Tensor]  #: down's two halves and up's


class TTAdapters:
    """Hooks on the sites of a base, which is as it was except while they hold numbers."""

    def __init__(self, base: Base, spec: AdapterSpec) -> None:
        self._spec = spec
        self._thin: list[Thin] | None = None
        paths = {"attention": base.architecture.attention, "mlp": base.architecture.mlp}
        modules = (base.blocks[block].get_submodule(paths[site]) for block, site in self._sites)
        self._hooks = [module.register_forward_hook(self._hook(i)) for i, module in enumerate(modules)]

    @property
    def _sites(self) -> list[tuple[int, str]]:
        return [(block, site) for block in self._spec.blocks for site in self._spec.sites]

    @property
    def size(self) -> int:
        """How many numbers of theta, from its start, belong to the adapters."""
        return len(self._sites) * (self._spec.down.size + self._spec.up.size)

    def hold(self, numbers: Tensor) -> None:
        """Take the adapters' part of theta, (size,): sites one after another, as in the layout."""
        down, up = self._spec.down, self._spec.up
        downs, ups = torch.split(numbers.reshape(-1, down.size + up.size), [down.size, up.size], dim=1)
        halves = (*tt_halves(downs, down), *tt_halves(ups, up))
        self._thin = list(zip(*(half.unbind(0) for half in halves), strict=True))

    def release(self) -> None:
        self._thin = None

    @contextlib.contextmanager
    def holding(self, numbers: Tensor) -> Iterator[None]:
        """`hold` for the length of one forward pass."""
        self.hold(numbers)
        try:
            yield
        finally:
            self.release()

    def remove(self) -> None:
        """Take the hooks off the base."""
        for hook in self._hooks:
            hook.remove()

    def _hook(self, index: int) -> Callable[[nn.Module, object, Tensor], Tensor]:
        def adapt(_module: nn.Module, _inputs: object, h: Tensor) -> Tensor:
            return h if self._thin is None else h + _adapter(h, *self._thin[index])

        return adapt


def _adapter(h: Tensor, *thin: Tensor) -> Tensor:
    """up(gelu(down(h))): (..., H) -> (..., H), each matrix as two thin products."""
    down_left, down_right, up_left, up_right = thin
    narrow = F.gelu(torch.mm(torch.mm(h.reshape(-1, h.shape[-1]), down_left), down_right))
    return torch.mm(torch.mm(narrow, up_left), up_right).reshape(h.shape)
