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
    attention: the output of that block's attention goes with it, (B, S, 2 H), as it is before any adapter.
    """

    def __init__(self, base: Base, cut: int, *, attention: bool = False) -> None:
        super().__init__()
        self.base, self.cut = base, cut
        self.attention = attention and cut < len(base.blocks)
        self.transformer = base.model

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        if self.cut == len(self.base.blocks):
            return self.base.run(ids, mask)
        with (
            _note(self.base, self.cut, attention=self.attention) as found,
            _blocks(self.base, slice(self.cut + self.attention)),
        ):
            self.base.run(ids, mask)
        return _beside(found)


def run_noting(
    base: Base, cuts: Sequence[int], ids: Tensor, mask: Tensor, *, attention: bool = False
) -> tuple[Tensor, list[Tensor]]:
    """What `base.run` gives, and what `Prefix` gives at each of the cuts, from one pass."""
    blocks = len(base.blocks)
    with contextlib.ExitStack() as hooks:
        noted = {
            cut: hooks.enter_context(_note(base, cut, attention=attention)) for cut in cuts if cut < blocks
        }
        output = base.run(ids, mask)
    return output, [output if cut == blocks else _beside(noted[cut]) for cut in cuts]


def run_above(base: Base, cut: int, hidden: Tensor, mask: Tensor, *, attention: bool = False) -> Tensor:
    """What `base.run` gives where `hidden` enters block `cut`, made by a `Prefix` of the same `attention`.

    What runs for nothing, embeddings over zeros and an attention whose output is known, nobody reads: a trace
    drops it.
    """
    if cut == len(base.blocks):
        return hidden
    state, attended = hidden.chunk(2, -1) if attention else (hidden, None)

    def enter(_block: nn.Module, inputs: tuple[object, ...]) -> tuple[object, ...]:
        return (state, *inputs[1:])

    def know(*_: object) -> Tensor | None:
        return attended

    with _blocks(base, slice(cut, None)) as (first, *_rest), contextlib.ExitStack() as hooks:
        module = first.get_submodule(base.architecture.attention)
        hooks.enter_context(_hook(first.register_forward_pre_hook(enter)))
        hooks.enter_context(_hook(module.register_forward_hook(know, prepend=True)))
        return base.run(torch.zeros_like(mask), mask)


@contextlib.contextmanager
def _note(base: Base, cut: int, *, attention: bool) -> Iterator[list[Tensor]]:
    """What a pass then gives at a cut, in order; hooks that come first see outputs without adapters."""
    found: list[Tensor] = []

    def keep(_module: nn.Module, _inputs: object, output: Tensor | tuple[Tensor, ...]) -> None:
        found.append(output if isinstance(output, Tensor) else output[0])

    with contextlib.ExitStack() as hooks:
        hooks.enter_context(_hook(base.blocks[cut - 1].register_forward_hook(keep)))
        if attention:
            module = base.blocks[cut].get_submodule(base.architecture.attention)
            hooks.enter_context(_hook(module.register_forward_hook(keep, prepend=True)))
        yield found


def _beside(found: list[Tensor]) -> Tensor:
    return found[0] if len(found) == 1 else torch.cat(found, -1)


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
