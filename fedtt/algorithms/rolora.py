"""RoLoRA: federated LoRA whose factors are trained in turn.

S. Chen, Y. Guo, Y. Ju, H. Dalal, Z. Zhu, A. Khisti. "Robust federated finetuning of LLMs via alternating
optimization of LoRA". NeurIPS 2025, arXiv 2502.01755; before it S. Chen, Y. Ju, H. Dalal, Z. Zhu,
A. Khisti. "Robust federated finetuning of foundation models via alternating minimization of LoRA". 2024,
arXiv 2409.02346.
"""

from __future__ import annotations

from typing import Annotated

import numpy as np
from msgspec import Meta

from fedtt.adapter import AdapterSpec
from fedtt.algorithms.fedavg import FedAvg
from fedtt.algorithms.kind_check import check_kind
from fedtt.layout import LiveSet
from fedtt.server_optimiser import ServerState

__all__ = ["RoLoRA"]


class RoLoRA(FedAvg, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True, tag="rolora"):
    """B with A frozen in odd turns, A with B frozen in even ones, the head in all.

    B A is linear in either factor, so each round's mean is that of the devices' matrices. B comes first:
    while it is zero, as it starts, A has no gradient.

    With asynchrony an update may come late within its turn. The frozen factor is then that of its base still,
    and Σ_k w_k ΔB_k A = (Σ_k w_k ΔB_k) A is the mean of the changes of the matrices exactly, however many
    versions old each base is. Their gradients were taken at those bases, as everywhere with asynchrony. Once
    the other factor has had its turn, ΔB_k A is another change than the one that was trained: it is stale.
    """

    epoch_rounds: Annotated[int, Meta(ge=1, le=10**6)] = 1  #: rounds that each turn lasts

    def same_gauge(self, earlier: int, later: int) -> bool:
        """Within a turn alone the partner of the live factor stands still."""
        return self._epoch(earlier) == self._epoch(later)

    def check(self, adapter: AdapterSpec) -> None:
        check_kind(adapter, "rolora", "lora")

    def live(self, adapter: AdapterSpec, round_number: int, state: ServerState | None = None) -> LiveSet:
        """One factor of every pair and the head; a pair's B until it has been folded, for rounds may fail.

        Pair by pair: below `training.depth` no B is ever folded.
        """
        turn_of_b = self._epoch(round_number) % 2 == 0
        frozen = {
            pair.a if turn_of_b or not _was_folded(state, pair.b) else pair.b for pair in adapter.lora_pairs
        }
        return LiveSet(adapter.layout, (i for i in adapter.layout.everything.indices if i not in frozen))

    def _epoch(self, round_number: int) -> int:
        return (round_number - 1) // self.epoch_rounds


def _was_folded(state: ServerState | None, factor: int) -> bool:
    return state is not None and not np.isnan(state.norms[factor])
