"""Tensor-train algebra on numpy arrays.

A matrix W (d_in, d_out) with d_in = Π in_modes and d_out = Π out_modes is held as cores
G_k (r_{k-1}, n_k, r_k), r_0 = r_J = 1, over the modes in_modes ++ out_modes:

    W[i, o] = G_1[i_1] ··· G_s[i_s] G_{s+1}[o_1] ··· G_J[o_{J-s}]

with row-major multi-indices i and o. The split s lies between the two directions, so W = L R with
L (d_in, r_s) and R (r_s, d_out): multiplying never needs the dense matrix.

Oseledets, "Tensor-train decomposition", SIAM J. Sci. Comput. 33 (2011); as adapters: Yang et al.,
"LoRETTA", NAACL 2024, arXiv 2402.11417.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import reduce
from typing import Annotated, Any

import numpy as np
from msgspec import Meta, Struct
from numpy.typing import NDArray

from fedtt.errors import LayoutError

__all__ = [
    "Array",
    "TTMatrix",
    "orthogonalise",
    "padded_size",
    "plan_modes",
    "tt_dense",
    "tt_halves",
    "tt_matvec",
    "tt_round",
    "tt_svd",
]

Array = NDArray[np.floating[Any]]

#: Bounds for foreign specs: with them no layout can count past 64 bits.
Modes = Annotated[tuple[Annotated[int, Meta(ge=1, le=2**16)], ...], Meta(min_length=1, max_length=16)]

_TYPICAL_MODE = 8
_LARGEST_MODE = 16


class TTMatrix(Struct, frozen=True, forbid_unknown_fields=True):
    """The shape of a TT matrix: modes of both directions and the largest rank."""

    in_modes: Modes
    out_modes: Modes
    rank: Annotated[int, Meta(ge=1, le=2**12)]

    def __post_init__(self) -> None:
        if not self.in_modes or not self.out_modes or min(self.modes) < 1 or self.rank < 1:
            raise LayoutError(
                f"a TT matrix needs positive modes and rank, got {self.in_modes} | {self.out_modes}, "
                f"rank {self.rank}"
            )

    @property
    def modes(self) -> tuple[int, ...]:
        return self.in_modes + self.out_modes

    @property
    def split(self) -> int:
        """How many leading cores belong to the input."""
        return len(self.in_modes)

    @property
    def d_in(self) -> int:
        return math.prod(self.in_modes)

    @property
    def d_out(self) -> int:
        return math.prod(self.out_modes)

    @property
    def ranks(self) -> tuple[int, ...]:
        """r_0 … r_J, each at most `rank` and at most what its two sides can carry."""
        n = self.modes
        return tuple(
            min(self.rank, math.prod(n[:k]), math.prod(n[k:])) if 0 < k < len(n) else 1
            for k in range(len(n) + 1)
        )

    @property
    def core_shapes(self) -> tuple[tuple[int, int, int], ...]:
        r = self.ranks
        return tuple((r[k], n, r[k + 1]) for k, n in enumerate(self.modes))

    @property
    def size(self) -> int:
        """Trained numbers: Σ_k r_{k-1} n_k r_k."""
        return sum(math.prod(shape) for shape in self.core_shapes)


def _splits(n: int, parts: int, smallest: int = 1) -> list[tuple[int, ...]]:
    """Every non-decreasing way to write n as a product of `parts` numbers of at least `smallest`."""
    if parts == 1:
        return [(n,)] if n >= smallest else []
    return [
        (d, *rest)
        for d in range(max(smallest, 1), round(n ** (1 / parts)) + 1)
        if n % d == 0
        for rest in _splits(n // d, parts - 1, d)
    ]


def plan_modes(size: int) -> tuple[int, ...]:
    """Factor a dimension into about log_8(size) modes of nearly equal length, longest first.

    384 -> (8, 8, 6), 768 -> (12, 8, 8), 1024 -> (16, 8, 8), 4096 -> (8, 8, 8, 8), 64 -> (8, 8).
    The sum of modes, and with it the number of trained values, is the least for that many modes.
    Output directions take them reversed: the longest mode then meets the outer rank, which is 1.
    """
    if size < 1:
        raise LayoutError(f"a dimension must be at least 1 to be planned, got {size}")
    parts = max(1, round(math.log(size, _TYPICAL_MODE))) if size > 1 else 1
    best = min(_splits(size, parts), key=lambda modes: (sum(modes), modes))
    return tuple(sorted(best, reverse=True))


def padded_size(size: int) -> int:
    """The smallest dimension ≥ size whose planned modes are all at most 16 (151 labels -> 154).

    A count of labels may be prime; rows beyond it are sliced off after the product.
    """
    n = size
    while max(plan_modes(n)) > _LARGEST_MODE:
        n += 1
    return n


def _check(cores: Sequence[Array], split: int) -> None:
    if not 0 < split < len(cores):
        raise LayoutError(f"the split must lie inside the train of {len(cores)} cores, got {split}")


def tt_halves(cores: Sequence[Array], split: int) -> tuple[Array, Array]:
    """The thin factors of W = L R:  L (d_in, r_split), R (r_split, d_out)."""
    _check(cores, split)
    one: Array = np.ones((1, 1), cores[0].dtype)
    left = reduce(lambda a, g: np.tensordot(a, g, 1).reshape(-1, g.shape[2]), cores[:split], one)
    right = reduce(lambda b, g: np.tensordot(g, b, 1).reshape(g.shape[0], -1), reversed(cores[split:]), one)
    return left, right


def tt_matvec(cores: Sequence[Array], x: Array, split: int) -> Array:
    """Multiply a batch by a matrix held as a tensor train, never forming the matrix.

    cores: G_k of shape (r_{k-1}, n_k, r_k), r_0 = r_J = 1; the first `split` modes multiply to d_in.
    x: (..., d_in).  Returns (..., d_out).  Cost: O(r (d_in + d_out)) a row.
    """
    left, right = tt_halves(cores, split)
    if x.shape[-1] != left.shape[0]:
        raise LayoutError(f"x has {x.shape[-1]} columns, the train takes {left.shape[0]}")
    product: Array = (x @ left) @ right
    return product


def tt_dense(cores: Sequence[Array], split: int) -> Array:
    """The matrix itself, (d_in, d_out); for tests, folds of dense deltas and small matrices."""
    left, right = tt_halves(cores, split)
    dense: Array = left @ right
    return dense


def tt_svd(dense: Array, matrix: TTMatrix) -> list[Array]:
    """Best-effort TT cores of a dense matrix (Oseledets 2011, Algorithm 1), computed in float64.

    dense: (d_in, d_out).  Returns cores shaped as `matrix.core_shapes`. The error is at most
    sqrt(Σ_k ε_k²) with ε_k the Frobenius norm cut away at bond k.
    """
    if dense.shape != (matrix.d_in, matrix.d_out):
        raise LayoutError(f"expected a matrix of {(matrix.d_in, matrix.d_out)}, got {dense.shape}")
    rest = np.asarray(dense, dtype=np.float64).reshape(1, -1)
    cores: list[Array] = []
    for r0, n, r1 in matrix.core_shapes[:-1]:
        u, s, vt = np.linalg.svd(rest.reshape(r0 * n, -1), full_matrices=False)  # lines 4 and 5
        cores.append(u[:, :r1].reshape(r0, n, r1))  # line 6
        rest = s[:r1, None] * vt[:r1]  # line 7
    cores.append(rest.reshape(matrix.core_shapes[-1]))  # line 9
    return cores


def orthogonalise(cores: Sequence[Array], centre: int) -> list[Array]:
    """The same matrix with cores orthonormal on both sides of core `centre` (a change of gauge).

    Left of the centre Σ_n G_k[n]ᵀ G_k[n] = I, right of it Σ_n G_k[n] G_k[n]ᵀ = I, so a change of the
    centre core moves the dense matrix by exactly its own Frobenius norm. Ranks must not exceed what
    each side can carry (true of `TTMatrix.core_shapes`).
    """
    out: list[Array] = [np.asarray(core, dtype=np.float64) for core in cores]
    for k in range(centre):
        r0, n, r1 = out[k].shape
        q, r = np.linalg.qr(out[k].reshape(r0 * n, r1))
        out[k] = q.reshape(r0, n, -1)
        out[k + 1] = np.tensordot(r, out[k + 1], 1)
    for k in range(len(out) - 1, centre, -1):
        r0, n, r1 = out[k].shape
        q, r = np.linalg.qr(out[k].reshape(r0, n * r1).T)
        out[k] = q.T.reshape(-1, n, r1)
        out[k - 1] = np.tensordot(out[k - 1], r.T, 1)
    return out


def tt_round(cores: Sequence[Array], rank: int) -> list[Array]:
    """Lower every rank to at most `rank` (Oseledets 2011, Algorithm 2), computed in float64."""
    if rank < 1:
        raise LayoutError(f"a rank must be at least 1, got {rank}")
    out = orthogonalise(cores, 0)  # its first loop, from right to left; the second follows
    for k in range(len(out) - 1):
        r0, n, _ = out[k].shape
        u, s, vt = np.linalg.svd(out[k].reshape(r0 * n, -1), full_matrices=False)
        keep = min(rank, len(s))
        out[k] = u[:, :keep].reshape(r0, n, keep)
        out[k + 1] = np.tensordot(s[:keep, None] * vt[:keep], out[k + 1], 1)
    return out
