"""What factors stand for, as vectors in which different ranks and versions mean the same.

The entries of every matrix that some factors stand for, then all other numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fedtt.adapter import AdapterSpec
from fedtt.layout import Factor, FactorLayout, LiveSet, Theta
from fedtt.tensor_train import Array
from fedtt.tt_rounding import effective_rank

__all__ = ["Cut", "Dense", "Matrix", "Product", "Truncation", "Vector", "factors_of", "loose_of", "put_"]

Matrix = Array  #: computed in float64
Vector = NDArray[np.float64]


class Cut(NamedTuple):
    """A matrix as factors of some rank."""

    factors: Sequence[Matrix]  #: shaped as the product's
    sigma: Vector  #: singular values that were kept


class Product(NamedTuple):
    """Some factors of a layout that stand for one matrix, as W(θ)."""

    prefix: str
    indices: Sequence[int]
    shape: tuple[int, int]
    dense: Callable[[Sequence[Matrix]], Matrix]  #: their arrays -> the matrix
    #: the matrix and factors of any rank near it -> at this rank; directions that W lacks are theirs
    rounded: Callable[[Matrix, Sequence[Matrix]], Cut]


class Dense:
    """What the live factors of an adapter stand for, as one vector (D,)."""

    def __init__(self, adapter: AdapterSpec, products: Sequence[Product], live: Sequence[int]) -> None:
        self._live, loose = LiveSet(adapter.layout, live), loose_of(adapter, products)
        firsts, chosen = [*(p.indices[0] for p in products), *loose], frozenset(live)
        self.products = [p for p in products if p.indices[0] in chosen]
        self.loose = [i for i in loose if i in chosen]
        matrices = [Factor(p.prefix, p.shape) for p in products]
        layout = FactorLayout([*matrices, *(adapter.layout.factors[i] for i in loose)])
        self.space = LiveSet(layout, (k for k, first in enumerate(firsts) if first in chosen))

    def of(self, theta: NDArray[np.floating[Any]]) -> Vector:
        """W(θ), (D,), for theta (P,)."""
        layout, wide = self._live.layout, theta.astype(np.float64)
        matrices = [p.dense(factors_of(layout, wide, p.indices)) for p in self.products]
        return np.concatenate(
            [part.reshape(-1) for part in (*matrices, *factors_of(layout, wide, self.loose))]
        )

    def after(self, base: Theta, delta: NDArray[np.floating[Any]]) -> Vector:
        """W(base + delta), (D,), for a delta of the live numbers."""
        return self.of(base + self._live.scatter(delta.astype(np.float64)))

    def parts(self, vector: Vector) -> list[Vector]:
        """A vector (D,) by product and loose factor, in their order."""
        return np.split(vector, np.cumsum(self.space.sizes)[:-1])


def loose_of(adapter: AdapterSpec, products: Iterable[Product]) -> list[int]:
    """The factors that belong to no product: biases, a dense head. They are the same at every rank."""
    taken = {i for product in products for i in product.indices}
    return [i for i in adapter.layout.everything.indices if i not in taken]


def factors_of(layout: FactorLayout, theta: Vector, indices: Iterable[int]) -> list[Matrix]:
    """Views into theta (P,), shaped as the factors of these indices."""
    return [theta[layout.slices[i]].reshape(layout.factors[i].shape) for i in indices]


def put_(layout: FactorLayout, theta: Vector, indices: Iterable[int], found: Iterable[Matrix]) -> None:
    for index, factor in zip(indices, found, strict=True):
        theta[layout.slices[index]] = factor.reshape(-1)


class Truncation:
    """What rounding cut away, matrix by matrix."""

    def __init__(self) -> None:
        self._of_matrix, self._of_change, self._ranks = list[float](), list[float](), list[float]()

    def saw(self, goal: Matrix, change: Matrix, found: Matrix, sigma: Vector) -> None:
        """goal: to be rounded; change: from before the round to it; found: what it was rounded to."""
        lost = float(np.linalg.norm(found - goal))
        self._of_matrix.append(_share(lost, goal))
        self._of_change.append(_share(lost, change))
        self._ranks.append(effective_rank(sigma))

    def report(self) -> dict[str, float]:
        """Shares are of Frobenius norms; empty where nothing was rounded."""
        if not self._ranks:
            return {}
        return {
            "truncated_share_worst": max(self._of_matrix),
            "truncated_share_mean": float(np.mean(self._of_matrix)),
            "truncated_share_of_change_worst": max(self._of_change),
            "truncated_share_of_change_mean": float(np.mean(self._of_change)),
            "effective_rank_least": min(self._ranks),
            "effective_rank_mean": float(np.mean(self._ranks)),
        }


def _share(lost: float, whole: Matrix) -> float:
    norm = float(np.linalg.norm(whole))
    return lost / norm if norm else 0.0
