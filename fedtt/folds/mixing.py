"""Nearest-neighbour mixing: before a robust fold, each update becomes the mean of those nearest to it.

Y. Allouah, S. Farhadkhani, R. Guerraoui, N. Gupta, R. Pinot, J. Stephan. "Fixing by mixing: a recipe for
optimal Byzantine ML under heterogeneity". AISTATS 2023, arXiv 2302.01772, Algorithm 2 (NNM).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["mix", "squared_distances"]

_BLOCK_NUMBERS = 4096  #: of each update that are mixed at once, so that no second copy of all is held


def squared_distances(rows: NDArray[np.float64]) -> NDArray[np.float64]:
    """‖Δ_i - Δ_j‖², (n, n), of rows (n, size), by one product; what rounding leaves below zero is zero."""
    squares = np.einsum("ij,ij->i", rows, rows)
    distances = rows @ rows.T
    distances *= -2
    distances += squares[:, None]
    distances += squares[None, :]
    return np.maximum(distances, 0.0, out=distances)


def mix(rows: NDArray[np.float64], left_out: int) -> None:
    """Put in place of each row (n, size) the mean of the n - left_out nearest to it, itself among them."""
    nearest = len(rows) - left_out
    distances = squared_distances(rows)
    np.fill_diagonal(distances, -1.0)
    neighbours = np.argsort(distances, axis=1, kind="stable")[:, :nearest]
    weights = distances
    weights[:] = 0.0
    np.put_along_axis(weights, neighbours, 1 / nearest, axis=1)
    for start in range(0, rows.shape[1], _BLOCK_NUMBERS):
        block = slice(start, start + _BLOCK_NUMBERS)
        rows[:, block] = weights @ rows[:, block]
