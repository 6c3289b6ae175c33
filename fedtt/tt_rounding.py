"""Back from a dense matrix to a tensor train that can be trained on.

TT-SVD (Oseledets 2011, Algorithm 1) finds the subspaces; which cores stand for them is free, and matters
twice. A direction j between cores k and k+1, W = Σ_j L[:, j] R[j, :], gets the gradients (∂W Rᵀ)[:, j] and
(Lᵀ ∂W)[j, :]: where its singular value has vanished and both L[:, j] and R[j, :] are small (as σ shared out
evenly between the two would make them), both are, and the direction is lost to training for good. And Adam
moves every number by about its learning rate, so the sizes of cores decide which of them learn how fast.
Here every L is orthonormal and the last core carries the size of W: no direction is dead on its left
(benchmarks/gauges.py compares forms).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fedtt.errors import LayoutError
from fedtt.tensor_train import Array, TTMatrix, orthogonalise

__all__ = ["Rounded", "effective_rank", "tt_round_near"]

#: σ/‖W‖ below which a direction counts as vanished: less than float32 factors can tell from zero.
_VANISHED = 1e-6

Matrix = NDArray[np.float64]


class Rounded(NamedTuple):
    """A tensor train and what was seen on the way to it."""

    cores: list[Matrix]  #: shaped as the matrix's `core_shapes`
    spectra: list[Matrix]  #: at each bond the singular values that were kept, (r_k,)


def tt_round_near(dense: Array, matrix: TTMatrix, near: Sequence[Array]) -> Rounded:
    """TT-SVD of W (d_in, d_out) at the ranks of `matrix`: cores G_k with Σ_n G_k[n]ᵀ G_k[n] = I but the last.

    near: a train over the same modes, of any ranks. Where fewer than r_k directions of W have not vanished,
    the rest are taken from near's left parts, so that a train which stands for zero keeps its random
    subspaces instead of what a library fills up singular vectors of zero with.

    The error is at most sqrt(Σ_k ε_k²) with ε_k the Frobenius norm cut away at bond k; vanished directions
    add 1e-6 ‖W‖ at most to each. NaN throughout where W is not finite.
    """
    if dense.shape != (matrix.d_in, matrix.d_out) or len(near) != len(matrix.modes):
        raise LayoutError(f"a matrix of {dense.shape} and {len(near)} cores do not fit {matrix}")
    rest = np.asarray(dense, np.float64).reshape(1, -1)
    if not np.isfinite(np.linalg.norm(rest)):
        return _nothing(matrix)
    frames = orthogonalise(near, len(near) - 1)
    overlap, cores, spectra = np.ones((1, 1)), list[Matrix](), list[Matrix]()
    for (r0, n, r1), frame in zip(matrix.core_shapes[:-1], frames[:-1], strict=True):
        rest = rest.reshape(r0 * n, -1)
        known = np.tensordot(overlap, frame, 1).reshape(r0 * n, -1)
        u, sigma = _leading(rest, known, r1)  # line 5 of TT-SVD, at a rank that is given
        cores.append(u.reshape(r0, n, r1))  # line 6
        spectra.append(sigma)
        rest, overlap = u.T @ rest, u.T @ known  # line 7
    cores.append(rest.reshape(matrix.core_shapes[-1]))  # line 9
    return Rounded(cores, spectra)


def _leading(rest: Matrix, known: Matrix, count: int) -> tuple[Matrix, Matrix]:
    """The `count` leading left singular vectors of `rest`, (m, count), and its extents along them.

    Columns of `known`, scaled below everything that has not vanished, supply what `rest` has too few of:
    they turn the others by 1e-12 at most.
    """
    size = np.linalg.norm(rest) or 1.0
    u = np.linalg.svd(np.hstack([rest, _VANISHED * size * known]), full_matrices=False)[0][:, :count]
    return u, np.linalg.norm(u.T @ rest, axis=1)


def _nothing(matrix: TTMatrix) -> Rounded:
    shapes = matrix.core_shapes
    return Rounded([np.full(s, np.nan) for s in shapes], [np.full(s[2], np.nan) for s in shapes[:-1]])


def effective_rank(sigma: NDArray[np.float64]) -> float:
    """exp(-Σ p ln p) with p = σ / Σ σ: the number of directions if they were equal; 0 for the zero matrix.

    O. Roy, M. Vetterli. "The effective rank: a measure of effective dimensionality". EUSIPCO 2007.
    """
    if not sigma.any():
        return 0.0
    p = sigma / sigma.sum()
    p = p[p > 0]
    return float(np.exp(-(p * np.log(p)).sum()))
