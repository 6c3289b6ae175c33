"""Federated methods: one paper, one file, client half and server half together.

A method is an immutable value read from the task file; its methods are pure. `Method` is the closed
union of all of them, told apart by `name`.
"""

from fedtt.algorithms.base import Folded, Gradient, LocalResult, Steps, drive
from fedtt.algorithms.dense_adapter import DenseAdapter
from fedtt.algorithms.exact_fedtt import ExactFedTT
from fedtt.algorithms.fed_sb import FedSB
from fedtt.algorithms.fedavg import FedAvg
from fedtt.algorithms.fedlora import FedLoRA
from fedtt.algorithms.fedtt import FedTT
from fedtt.algorithms.fedtt_plus import FedTTPlus
from fedtt.algorithms.ffa_lora import FFALoRA
from fedtt.algorithms.flexlora import FlexLoRA
from fedtt.algorithms.head_only import LinearProbe
from fedtt.algorithms.hier_fedlora import Hierarchical, HierFedLoRA, HierFedTT
from fedtt.algorithms.mixed_ranks import Tier
from fedtt.algorithms.rolora import RoLoRA
from fedtt.algorithms.tt_svd_fedtt import TTSVDFedTT

__all__ = [
    "DenseAdapter",
    "ExactFedTT",
    "FFALoRA",
    "FedAvg",
    "FedLoRA",
    "FedSB",
    "FedTT",
    "FedTTPlus",
    "FlexLoRA",
    "Folded",
    "Gradient",
    "HierFedLoRA",
    "HierFedTT",
    "Hierarchical",
    "LinearProbe",
    "LocalResult",
    "Method",
    "RoLoRA",
    "Steps",
    "TTSVDFedTT",
    "Tier",
    "drive",
]

Method = (
    FedTT
    | FedTTPlus
    | ExactFedTT
    | TTSVDFedTT
    | FedLoRA
    | FFALoRA
    | RoLoRA
    | FlexLoRA
    | FedSB
    | HierFedLoRA
    | HierFedTT
    | DenseAdapter
    | LinearProbe
    | FedAvg
)
