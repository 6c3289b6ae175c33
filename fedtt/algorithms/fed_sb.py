"""Fed-SB: federated LoRA of which a small square matrix alone is trained.

R. Singhal, K. Ponkshe, R. Vartak, L. R. Varshney, P. Vepakomma. "Fed-SB: A silver bullet for extreme
communication efficiency and performance in (private) federated LoRA fine-tuning". 2025, arXiv 2502.15436.
Adapters: K. Ponkshe, R. Singhal, E. Gorbunov, A. Tumanov, S. Horvath, P. Vepakomma. "Initialization using
update approximation is a silver bullet for extremely efficient low-rank fine-tuning". 2024, arXiv 2411.19557.
Frames: `export.frames`.
"""

from __future__ import annotations

from fedtt.adapter import AdapterSpec
from fedtt.algorithms.fedavg import FedAvg
from fedtt.algorithms.kind_check import check_kind

__all__ = ["FedSB"]


class FedSB(FedAvg, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="fed-sb"):
    """R of every B R A and the head are trained, sent and averaged; A and B are the base's.

    B R A is linear in R, so the mean of the R's gives the mean of the devices' matrices exactly (§4), at r²
    numbers each, whatever the model's width.
    """

    def check(self, adapter: AdapterSpec) -> None:
        check_kind(adapter, "fed-sb", "lora-sb")
