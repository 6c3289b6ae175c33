"""A small adapter whose matrices are long tensor trains, and their dense forms by explicit sums."""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from msgspec.structs import replace
from numpy.typing import NDArray
from safetensors.numpy import save

from edge_client.tokens import Batch
from fedtt.adapter import AdapterSpec
from fedtt.kinds import HeadKind
from fedtt.layout import Theta
from fedtt.manifest import MANIFEST, FileEntry, bundle_digest, decode_manifest, encode_manifest
from fedtt.planning import plan_adapter, plan_head, plan_tt
from fedtt.tensor_train import tt_dense, tt_halves
from tests.support.edge import WholeSteps, write_small_bundle

__all__ = [
    "TowardsMatrices",
    "cores_of",
    "dense_by_sums",
    "dense_matrices",
    "long_adapter",
    "random_theta",
    "write_train_bundle",
]

Matrix = NDArray[np.float64]


def long_adapter(head: HeadKind | None = "tt", layers: int = 1) -> AdapterSpec:
    """Of each block two sites: down 2·3·2 | 2·2 and up 2·2 | 2·3·2, rank 2; the head 2·3·2 | 5."""
    return plan_adapter(
        plan_tt(hidden=12, bottleneck=4, rank=2, hidden_modes=(2, 3, 2), bottleneck_modes=(2, 2)),
        hidden=12,
        layers=layers,
        head=plan_head(head, hidden=12, labels=5, rank=2, hidden_modes=(2, 3, 2)) if head else None,
    )


def random_theta(adapter: AdapterSpec, seed: int) -> Theta:
    """Every core away from zero, so that every derivative is."""
    return np.random.default_rng(seed).standard_normal(adapter.layout.size).astype(np.float32)


def cores_of(adapter: AdapterSpec, theta: NDArray[np.floating[Any]], prefix: str) -> list[Matrix]:
    """The cores of one train in float64."""
    (train,) = (found for found in adapter.tt_matrices if found.prefix == prefix)
    return [
        theta[adapter.layout.slices[i]].reshape(adapter.layout.factors[i].shape).astype(np.float64)
        for i in train.indices
    ]


def dense_by_sums(cores: Sequence[Matrix], split: int) -> Matrix:
    """W[i, o] = G_1[i_1] ··· G_J[o_{J-s}], entry by entry."""
    modes = [core.shape[1] for core in cores]
    entries = []
    for index in itertools.product(*map(range, modes)):
        product = np.ones((1, 1))
        for core, n in zip(cores, index, strict=True):
            product = product @ core[:, n, :]
        entries.append(product.item())
    return np.array(entries).reshape(math.prod(modes[:split]), -1)


def dense_matrices(adapter: AdapterSpec, theta: NDArray[np.floating[Any]]) -> dict[str, Matrix]:
    """Every TT matrix by its prefix."""
    return {
        prefix: dense_by_sums(cores_of(adapter, theta, prefix), matrix.split)
        for prefix, matrix, _ in adapter.tt_matrices
    }


class TowardsMatrices(WholeSteps):
    """A Runtime with the loss ½ Σ ‖W − W*‖² over all TT matrices; W* depends on the batch's mean label.

    So devices whose labels differ pull each matrix towards another one, and the gradient is that of a real
    tensor train.
    """

    def __init__(self, adapter: AdapterSpec, seed: int = 0) -> None:
        self._adapter = adapter
        goals = [_matrices(adapter, 0.6 * random_theta(adapter, seed + i)) for i in (1, 2)]
        self._mean, self._skew = goals

    def gradient(self, theta: Theta, batch: Batch) -> tuple[float, Theta]:
        assert batch.labels is not None
        share, loss = float(batch.labels.mean()) / 4 - 0.5, 0.0
        grad = np.zeros(theta.size)
        for prefix, matrix, indices in self._adapter.tt_matrices:
            cores = cores_of(self._adapter, theta, prefix)
            away = tt_dense(cores, matrix.split) - self._mean[prefix] - share * self._skew[prefix]
            loss += 0.5 * float((away**2).sum())
            for k, index in enumerate(indices):
                grad[self._adapter.layout.slices[index]] = _core_gradient(cores, k, away).reshape(-1)
        return loss, grad.astype(np.float32)

    def logits(self, theta: Theta, batch: Batch) -> NDArray[np.float32]:
        return np.zeros((len(batch.ids), 5), np.float32)


def _matrices(adapter: AdapterSpec, theta: Theta) -> dict[str, Matrix]:
    return {
        prefix: np.asarray(tt_dense(cores_of(adapter, theta, prefix), matrix.split))
        for prefix, matrix, _ in adapter.tt_matrices
    }


def _core_gradient(cores: list[Matrix], k: int, away: Matrix) -> Matrix:
    """∂/∂G_k of ½‖W − W*‖² = Lᵀ (W − W*) Rᵀ."""
    r0, n, r1 = cores[k].shape
    left = tt_halves([*cores[:k], np.eye(r0)[:, :, None]], k)[0] if k else np.ones((1, 1))
    after = cores[k + 1 :]
    right = tt_halves([np.eye(r1)[None], *after], 1)[1] if after else np.ones((1, 1))
    found: Matrix = np.einsum("la,lnr,br->anb", left, away.reshape(len(left), n, right.shape[1]), right)
    return found


def write_train_bundle(directory: Path, adapter: AdapterSpec, theta: Theta) -> str:
    """A small bundle of this adapter, with five labels; its graphs are never loaded. Returns its name."""
    write_small_bundle(directory, base_bytes=1000)
    manifest = decode_manifest((directory / MANIFEST).read_bytes())
    factors = save(adapter.layout.unflatten(theta))
    (directory / manifest.initial).write_bytes(factors)
    entry = FileEntry(hashlib.sha256(factors).hexdigest(), len(factors))
    data = encode_manifest(
        replace(
            manifest,
            adapter=adapter,
            layout_sha256=adapter.layout.digest,
            labels=("a", "b", "c", "d", "e"),
            files=manifest.files | {manifest.initial: entry},
        )
    )
    (directory / MANIFEST).write_bytes(data)
    return bundle_digest(data)
