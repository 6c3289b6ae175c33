"""TT-SVD FedTT: the mean of what the devices' trains stand for, rounded back to a train.

Ours, for devices of different ranks, which FedTT (Ghiasvand et al., Findings of ACL 2025, arXiv 2410.13097)
leaves open. It takes from
- TT-SVD: I. V. Oseledets. "Tensor-train decomposition". SIAM J. Sci. Comput. 33 (2011), 2295-2317,
  Algorithm 1, with the bound of its Corollary 2.4;
- the dense mean of low-rank updates: FlexLoRA (Bai et al., NeurIPS 2024, arXiv 2402.11505);
- what happens to such a mean: F. Wu, J. Hu, G. Min, S. Wang. "Preventing rank collapse in federated low-rank
  adaptation with client heterogeneity". 2026, arXiv 2602.13486.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from fedtt.adapter import AdapterSpec
from fedtt.algorithms.dense_space import Cut, Matrix, Product
from fedtt.algorithms.kind_check import check_kind
from fedtt.algorithms.mixed_ranks import MixedRanks
from fedtt.tensor_train import TTMatrix, tt_dense
from fedtt.tt_rounding import tt_round_near

__all__ = ["TTSVDFedTT"]


class TTSVDFedTT(MixedRanks, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="tt-svd-fedtt"):
    """All cores are trained and sent, at the rank of the device's tier; the server averages matrices.

    With W(θ) a train's dense matrix, θ_r the base of rank r and Δ_k of a device of rank r_k,

        W̄ = W(θ) + Σ_k (n_k / n) [W(θ_{r_k} + Δ_k) - W(θ_{r_k})],      θ' = TT-SVD(W̄).

    Each delta is taken against its device's own base, of its own rank and, where rounds are asynchronous, of
    its own version: were the matrices themselves averaged, every round would scale the directions that low
    ranks cannot hold by the share of the others, trained or not, until only the smallest rank were left
    (rank collapse; Wu et al., §4). So those directions move more slowly, since only some devices can move
    them, and they never shrink by themselves. A matrix whose change is zero keeps its cores to the bit.

    Another fold than the mean, and a server optimiser, act on the entries of these changes in its place.
    """

    def check(self, adapter: AdapterSpec) -> None:
        check_kind(adapter, "tt-svd-fedtt", "tt")
        self.check_tiers(adapter)

    def products(self, adapter: AdapterSpec) -> Sequence[Product]:
        return tuple(
            Product(
                train.prefix,
                train.indices,
                (train.matrix.d_in, train.matrix.d_out),
                partial(tt_dense, split=train.matrix.split),
                partial(_rounded, train.matrix),
            )
            for train in adapter.tt_matrices
        )


def _rounded(matrix: TTMatrix, goal: Matrix, near: Sequence[Matrix]) -> Cut:
    """TT-SVD(W̄), Algorithm 1 of Oseledets, and the singular values between input and output modes."""
    found = tt_round_near(goal, matrix, near)
    return Cut(found.cores, found.spectra[matrix.split - 1])
