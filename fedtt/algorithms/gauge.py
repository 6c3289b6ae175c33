"""Coordinates of a live core in which its own norm is that of the matrix.

With the interfaces L (Π n_{<k}, r_{k-1}) and R (r_k, Π n_{>k}) of core k, W = L G_k R. Written with the
symmetric square roots S_L = (LᵀL)^{1/2} and S_R = (RRᵀ)^{1/2},

    W = (L S_L⁻¹) G'_k (S_R⁻¹ R),    G'_k = S_L G_k S_R,

whose outer parts are orthonormal: ‖ΔW‖_F = ‖ΔG'_k‖_F, for whatever moves the core. Square roots are
unique where a QR decomposition chooses signs and bases, so two machines find the same coordinates.

P.-O. Löwdin. "On the non-orthogonality problem connected with the use of atomic wave functions in the
theory of molecules and crystals". J. Chem. Phys. 18 (1950), 365-375 (symmetric orthogonalisation).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fedtt.adapter import AdapterSpec
from fedtt.errors import LayoutError, WireError
from fedtt.layout import LiveSet, Theta
from fedtt.tensor_train import Array

__all__ = ["Gauge", "interface_grams"]

#: σ/σ_max below which a direction of an interface is stretched no further: it hardly reaches the matrix,
#: and its inverse would only amplify rounding.
_SMALLEST = 1e-3

Matrix = NDArray[np.float64]


class _Root(NamedTuple):
    """S and S⁻¹ of one interface, both symmetric (r, r)."""

    root: Matrix
    inverse: Matrix


class _LiveCore(NamedTuple):
    numbers: slice  #: where its numbers stand among the live ones
    shape: tuple[int, ...]  #: (r_{k-1}, n_k, r_k)
    left: _Root
    right: _Root


class Gauge:
    """The change of coordinates of a live set with one core of a train, none or all.

    A train that is live whole has no core that it could be orthogonal around, and is left as it is.

    It depends on the cores that are not live alone, so it is one and the same for all base versions
    between which only the live set moved. Raises LayoutError for a live set with some cores of one train,
    WireError where the factors are too large for an interface to be finite.
    """

    def __init__(self, adapter: AdapterSpec, theta: Theta, live: LiveSet) -> None:
        self._cores = tuple(_live_cores(adapter, theta, live))

    def enter(self, x: NDArray[np.floating[Any]]) -> Matrix:
        """G -> G' on the live numbers (live.size,); biases and other numbers stay as they are."""
        out = x.astype(np.float64)
        for numbers, shape, left, right in self._cores:
            out[numbers] = _between(left.root, out[numbers].reshape(shape), right.root)
        return out

    def leave(self, x: NDArray[np.floating[Any]]) -> Matrix:
        """G' -> G; and of a gradient ∂f/∂G -> ∂f/∂G', as both roots are symmetric."""
        out = x.astype(np.float64)
        for numbers, shape, left, right in self._cores:
            out[numbers] = _between(left.inverse, out[numbers].reshape(shape), right.inverse)
        return out


def _live_cores(adapter: AdapterSpec, theta: Theta, live: LiveSet) -> Iterator[_LiveCore]:
    ends = itertools.accumulate(live.sizes)
    places = {i: slice(end - n, end) for i, n, end in zip(live.indices, live.sizes, ends, strict=True)}
    for train in adapter.tt_matrices:
        centres = [k for k, index in enumerate(train.indices) if index in places]
        if len(centres) == len(train.indices):
            continue
        if len(centres) > 1:
            raise LayoutError(f"{train.prefix} has {len(centres)} live cores, these coordinates are of one")
        shapes = train.matrix.core_shapes
        for k in centres:
            slices = [adapter.layout.slices[index] for index in train.indices]
            cores = [theta[s].reshape(shape) for s, shape in zip(slices, shapes, strict=True)]
            left, right = (_root(gram) for gram in interface_grams(cores, k))
            yield _LiveCore(places[train.indices[k]], shapes[k], left, right)


def interface_grams(cores: Sequence[Array], centre: int) -> tuple[Matrix, Matrix]:
    """LᵀL (r_{k-1}, r_{k-1}) and RRᵀ (r_k, r_k) of core `centre`, in float64, core by core."""
    left, right = np.ones((1, 1)), np.ones((1, 1))
    with np.errstate(over="ignore", invalid="ignore"):
        for core in cores[:centre]:
            G = core.astype(np.float64)
            left = np.einsum("anb,anc->bc", np.tensordot(left, G, 1), G)
        for core in reversed(cores[centre + 1 :]):
            G = core.astype(np.float64)
            right = np.einsum("anb,cnb->ac", np.tensordot(G, right, 1), G)
    return left, right


def _root(gram: Matrix) -> _Root:
    """The identity for an interface that is zero, as that of a core beside one which starts at zero."""
    if not np.isfinite(gram).all():
        raise WireError("the factors are too large: the training diverged; lower the learning rate")
    squares, V = np.linalg.eigh(gram)
    if squares[-1] <= 0:
        return _Root(np.eye(len(gram)), np.eye(len(gram)))
    sigma = np.sqrt(np.maximum(squares, _SMALLEST**2 * squares[-1]))
    return _Root((V * sigma) @ V.T, (V / sigma) @ V.T)


def _between(left: Matrix, core: Matrix, right: Matrix) -> Matrix:
    """left · G[n] · right for every n, flat."""
    r0, n, r1 = core.shape
    product: Matrix = ((left @ core.reshape(r0, n * r1)).reshape(r0 * n, r1) @ right).reshape(-1)
    return product
