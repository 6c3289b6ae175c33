"""Adapters of different ranks side by side: where the numbers of a smaller one stand in a larger one.

Every core of a train, and both factors of a LoRA update, go into the leading block of the larger factor;
the rest is zero. Then every product is the same, so that the function of the small theta is that of its
embedding, and the gradients at embedded positions are equal.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fedtt.adapter import AdapterSpec
from fedtt.errors import LayoutError
from fedtt.kinds import DenseBottleneck, HeadOnly, HeadSpec, Inserted, Lora, LoraSB, TTBottleneck

__all__ = ["embedding"]


def embedding(small: AdapterSpec, large: AdapterSpec) -> NDArray[np.intp]:
    """For each number of the small theta its position in the large one, (P_small,).

    Raises LayoutError unless the two differ in nothing but ranks (LoRA: at equal α / r; dense adapters: in
    the bottleneck) and no rank of the small one is above that of the large one.
    """
    if _frame(small) != _frame(large):
        raise LayoutError("two adapters that differ in more than their ranks cannot be embedded")
    places: list[NDArray[np.intp]] = []
    pairs = zip(small.layout.factors, large.layout.factors, large.layout.slices, strict=True)
    for inner, outer, numbers in pairs:
        if any(n > m for n, m in zip(inner.shape, outer.shape, strict=True)):
            raise LayoutError(
                f"factor {inner.name!r} of shape {inner.shape} is larger than {outer.shape}: "
                "name the adapter of the smaller rank first"
            )
        positions = np.arange(numbers.start, numbers.stop, dtype=np.intp).reshape(outer.shape)
        places.append(positions[tuple(slice(n) for n in inner.shape)].reshape(-1))
    return np.concatenate(places)


def _frame(spec: AdapterSpec) -> tuple[object, ...]:
    """All that two specs must share for one to lie within the other."""
    return spec.hidden, spec.layers, spec.depth, _inner(spec.inserted), _outer(spec.head)


def _inner(inserted: Inserted) -> tuple[object, ...]:
    match inserted:
        case TTBottleneck(sites=sites, down=down, up=up):
            return "tt", sites, down.in_modes, down.out_modes, up.in_modes, up.out_modes
        case DenseBottleneck(sites=sites):
            return "dense", sites
        case Lora(targets=targets, scale=scale):
            return "lora", targets, f"{scale:.9g}"  # α r' / r is not exact
        case LoraSB():
            return ("lora-sb", inserted)
        case HeadOnly():
            return ("none",)


def _outer(head: HeadSpec | None) -> tuple[object, ...]:
    if head is None or head.matrix is None:
        return (head,)
    return head.kind, head.labels, head.matrix.in_modes, head.matrix.out_modes
