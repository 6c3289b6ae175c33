"""How much of a training step is left where only the last blocks are trained."""

from __future__ import annotations

from collections.abc import Sequence

from fedtt.adapter import AdapterSpec

__all__ = ["depth_share", "trained_depth", "work_share"]


def depth_share(depth: int, deepest: int) -> float:
    """(1 + 2 d/D) / 3: the work of a step that trains the last d of D adapted blocks.

    A pass forward costs as much as each of the two halves of a pass backward, gradients of activations and
    of weights, and the latter ends at the lowest trained block. Prefixes that are cached between steps would
    save the forward part too; nothing is assumed of them.
    """
    return (1 + 2 * depth / deepest) / 3 if deepest else 1.0


def trained_depth(adapter: AdapterSpec, live: Sequence[int]) -> int:
    """The last blocks that a gradient for these factors passes; 0 where they are the head's."""
    lowest = adapter.block_of(min(live))  # a layout goes from the first block to the head
    return 0 if lowest is None else adapter.layers - lowest


def work_share(adapter: AdapterSpec, live: Sequence[int]) -> float:
    """The work of a step that trains these factors alone, over that of one that trains all of them."""
    return depth_share(trained_depth(adapter, live), adapter.depth)
