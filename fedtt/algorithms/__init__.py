"""Federated methods: one paper, one file, client half and server half together.

A method is an immutable value read from the task file; its methods are pure. `Method` is the closed
union of all of them, told apart by `name`.
"""

from fedtt.algorithms.base import Contribution, Gradient, LocalResult
from fedtt.algorithms.fedavg import FedAvg
from fedtt.algorithms.fedtt import FedTT

__all__ = ["Contribution", "FedAvg", "FedTT", "Gradient", "LocalResult", "Method"]

Method = FedTT | FedAvg
