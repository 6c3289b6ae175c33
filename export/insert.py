"""Adapters as forward hooks: any transformers model is adapted without a change to its code."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from torch import Tensor, nn

from fedtt.adapter import AdapterSpec

from .base import Base
from .forms import Weights, form_of

__all__ = ["Adapters"]


class Adapters:
    """Hooks on the adapted modules of a base, which is as it was except while they hold numbers."""

    def __init__(self, base: Base, spec: AdapterSpec) -> None:
        self._form = form_of(spec.inserted)
        paths = self._form.paths(base.architecture)
        #: whether a block is frozen up to its attention's output where it is the first to be adapted
        self.after_attention = paths[:1] == [base.architecture.attention] and not self._form.reads_input
        self._blocks = spec.depth
        self._weights: list[Weights] | None = None
        self._device: Tensor | None = None
        self.size = spec.adapter_size
        modules = [base.blocks[block].get_submodule(path) for block in spec.blocks for path in paths]
        for module in modules:
            self._form.fixed(module)  # computed here: a trace reads what is there
        self._hooks = [module.register_forward_hook(self._hook(i)) for i, module in enumerate(modules)]

    def hold(self, numbers: Tensor, device: Tensor | None = None) -> None:
        """Take the adapters' part of theta, (size,), block by block as in the layout.

        With `device` (N,) numbers are those of D devices, (D, size), and row n is of device[n].
        """
        shape = (*numbers.shape[:-1], self._blocks, self.size // max(1, self._blocks))
        self._weights = self._form.weights(numbers.reshape(shape)) if self._blocks else []
        self._device = device

    def release(self) -> None:
        self._weights = self._device = None

    @contextlib.contextmanager
    def holding(self, numbers: Tensor, device: Tensor | None = None) -> Iterator[None]:
        """`hold` for the length of one forward pass."""
        self.hold(numbers, device)
        try:
            yield
        finally:
            self.release()

    def remove(self) -> None:
        """Take the hooks off the base."""
        for hook in self._hooks:
            hook.remove()

    def _hook(self, index: int) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
        def adapt(module: nn.Module, inputs: tuple[Tensor, ...], y: Tensor) -> Tensor:
            if self._weights is None:
                return y
            weights = self._weights[index]
            if self._device is not None:
                weights = tuple(weight.index_select(0, self._device) for weight in weights)
            return y + self._form.change(inputs[0], y, *weights, *self._form.fixed(module))

        return adapt
