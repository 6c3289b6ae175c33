"""A base cut in two: the frozen blocks below all adapters, and the rest, which trains.

What the lower part computes of a text never changes, so it is computed once and kept: the step over the
upper part alone gives the same gradients. Both parts run transformers' own code: the list of blocks is
cut for the length of one call, and hooks carry the hidden state past what lies outside.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .base import Base

__all__ = ["Prefix", "run_above", "run_noting"]


class Prefix(nn.Module):
    """ids (B, S), mask (B, S) -> the hidden state (B, S, H) that enters block `cut`.

    cut: from 1; with as many as there are blocks it is what the whole base gives.
    """

    def __init__(self, base: Base, cut: int) -> None:
        super().__init__()
        self.base, self.cut = base, cut
        self.transformer = base.model

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        if self.cut == len(self.base.blocks):
            return self.base.run(ids, mask)
        found: list[Tensor] = []

        def keep(_block: nn.Module, _inputs: object, output: Tensor | tuple[Tensor, ...]) -> None:
            found.append(output if isinstance(output, Tensor) else output[0])

        with _blocks(self.base, slice(self.cut)) as kept, _hook(kept[-1].register_forward_hook(keep)):
            self.base.run(ids, mask)
        return found[0]


def run_noting(base: Base, cuts: Sequence[int], ids: Tensor, mask: Tensor) -> tuple[Tensor, list[Tensor]]:
    """What `base.run` gives, and what `Prefix` gives at each of the cuts, from one pass."""
    found: dict[int, Tensor] = {}

    def keep(cut: int) -> RemovableHandle:
        def note(_block: nn.Module, _inputs: object, output: Tensor | tuple[Tensor, ...]) -> None:
            found[cut] = output if isinstance(output, Tensor) else output[0]

        return base.blocks[cut - 1].register_forward_hook(note)

    with contextlib.ExitStack() as hooks:
        for cut in cuts:
            hooks.enter_context(_hook(keep(cut)))
        output = base.run(ids, mask)
    return output, [output if cut == len(base.blocks) else found[cut] for cut in cuts]


def run_above(base: Base, cut: int, hidden: Tensor, mask: Tensor) -> Tensor:
    """What `base.run` gives where `hidden` (B, S, H) enters block `cut`.

    The embeddings still run, over zeros, and nobody reads what they give: a trace drops them.
    """
    if cut == len(base.blocks):
        return hidden

    def enter(_block: nn.Module, inputs: tuple[object, ...]) -> tuple[object, ...]:
        return (hidden, *inputs[1:])

    with _blocks(base, slice(cut, None)) as kept, _hook(kept[0].register_forward_pre_hook(enter)):
        return base.run(torch.zeros_like(mask), mask)


@contextlib.contextmanager
def _blocks(base: Base, part: slice) -> Iterator[list[nn.Module]]:
    """The base with this part of its blocks alone."""
    backbone, path = base.model.base_model, base.architecture.blocks
    whole = cast("nn.ModuleList", backbone.get_submodule(path))
    kept = list(whole)[part]
    backbone.set_submodule(path, nn.ModuleList(kept))
    try:
        yield kept
    finally:
        backbone.set_submodule(path, whole)


@contextlib.contextmanager
def _hook(handle: RemovableHandle) -> Iterator[None]:
    with handle:
        yield
