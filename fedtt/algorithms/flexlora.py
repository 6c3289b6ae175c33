"""FlexLoRA: the mean of LoRA's products, decomposed again by SVD, for devices of different ranks.

J. Bai, D. Chen, B. Qian, L. Yao, Y. Li. "Federated fine-tuning of large language models under heterogeneous
tasks and client resources". NeurIPS 2024, arXiv 2402.11505 (§3).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import ClassVar

import numpy as np

from fedtt.adapter import AdapterSpec
from fedtt.algorithms.dense_space import Cut, Matrix, Product
from fedtt.algorithms.kind_check import check_kind
from fedtt.algorithms.mixed_ranks import MixedRanks

__all__ = ["FlexLoRA"]

#: σ/‖W‖ below which a direction counts as vanished: less than float32 factors can tell from zero.
_VANISHED = 1e-6


class FlexLoRA(MixedRanks, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="flexlora"):
    """A and B are trained and sent at the rank of the device's tier; the server averages B A.

        W̄ = Σ_k (n_k / n) B_k A_k = U Σ Vᵀ,      B = U_r Σ_r,  A = V_rᵀ

    for its own rank and, from those, for each tier's. α / r is the same at all ranks, so it is left out.

    The products themselves are averaged, as in the paper, and not their changes: with mixed ranks every round
    scales what low ranks cannot hold by the share of the others (rank collapse; F. Wu, J. Hu, G. Min, S.
    Wang. 2026, arXiv 2602.13486). Where W̄ has fewer than r directions the paper leaves A open; here its
    remaining rows are directions of the A before, with B zero there, as LoRA itself begins: they have a
    gradient, and nothing depends on how a library fills up singular vectors of zero. A product whose change
    is zero keeps its A and B.

    Ours is what the paper does not have: W̄ - B A is what server optimisers see; a stale update brings s(τ)
    (n_k / n) (B_k A_k - B A), B A of the version that it was trained from; `fold.norm_bound` bounds what a
    device changed of its own base's products; and folds that are no mean compare changes of products, each
    against its device's own base, for by their products devices would look alike that have the same rank, and
    a majority of low ranks would cut the matrices down in one round.
    """

    averages_products: ClassVar[bool] = True

    def check(self, adapter: AdapterSpec) -> None:
        check_kind(adapter, "flexlora", "lora")
        self.check_tiers(adapter)

    def products(self, adapter: AdapterSpec) -> Sequence[Product]:
        found = []
        for pair in adapter.lora_pairs:
            (rank, d_in), (d_out, _) = (adapter.layout.factors[i].shape for i in (pair.a, pair.b))
            rounded = partial(_rounded, rank)
            found.append(Product(pair.prefix, (pair.a, pair.b), (d_out, d_in), _product, rounded))
        return found


def _product(pair: Sequence[Matrix]) -> Matrix:
    """B A (d_out, d_in) of A (rank, d_in) and B (d_out, rank)."""
    a, b = pair
    return b @ a


def _rounded(rank: int, w: Matrix, near: Sequence[Matrix]) -> Cut:
    """A = V_rᵀ (rank, d_in) and B = U_r Σ_r (d_out, rank) of W (d_out, d_in); NaN where W is not finite.

    Vanished directions are taken from the rows of the A that is near.
    """
    size = np.linalg.norm(w)
    if not np.isfinite(size):
        a, b = np.full((rank, w.shape[1]), np.nan), np.full((w.shape[0], rank), np.nan)
        return Cut((a, b), b[0])
    known = np.linalg.qr(near[0].T)[0].T
    # §3: U Σ Vᵀ of W̄, cut at r
    v = np.linalg.svd(np.vstack([w, _VANISHED * (size or 1.0) * known]), full_matrices=False)[2][:rank]
    b = w @ v.T
    return Cut((v, b), np.linalg.norm(b, axis=0))
