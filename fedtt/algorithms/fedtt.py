"""FedTT: federated fine-tuning with tensor-train adapters.

S. Ghiasvand, Y. Yang, Z. Xue, M. Alizadeh, Z. Zhang, R. Pedarsani. "Communication-efficient and
tensorized federated fine-tuning of large language models". Findings of ACL 2025, arXiv 2410.13097.
Adapters: Y. Yang, J. Zhou, N. Wong, Z. Zhang. "LoRETTA". NAACL 2024, arXiv 2402.11417.
"""

from __future__ import annotations

from fedtt.adapter import AdapterSpec
from fedtt.algorithms.fedavg import FedAvg
from fedtt.algorithms.kind_check import check_kind
from fedtt.algorithms.trains import outside_trains
from fedtt.layout import LiveSet
from fedtt.server_optimiser import ServerState

__all__ = ["FedTT"]


class FedTT(FedAvg, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="fedtt"):
    """All TT cores of all adapters, and the head, are trained, sent and averaged core by core (Algorithm 1).

    The mean is taken of each core, not of the matrices they stand for: W̄ = (Ḡ_1)···(Ḡ_J) differs from the
    mean of the devices' matrices by cross terms of second order in their deltas.
    """

    cores_only: bool = False  #: ours: biases and dense matrices stay as they started

    def check(self, adapter: AdapterSpec) -> None:
        check_kind(adapter, "fedtt", "tt")

    def live(self, adapter: AdapterSpec, round_number: int, state: ServerState | None = None) -> LiveSet:
        """All cores, and all else unless `cores_only`."""
        left_out = set(outside_trains(adapter)) if self.cores_only else set[int]()
        return LiveSet(adapter.layout, (i for i in adapter.layout.everything.indices if i not in left_out))
