from __future__ import annotations

from fedtt.algorithms import FedTT
from fedtt.algorithms.trains import outside_trains
from tests.support.trains import long_adapter

ADAPTER = long_adapter()


def test_by_cores_alone_biases_and_dense_matrices_are_left_out() -> None:
    every = ADAPTER.layout.everything.indices
    live = FedTT(cores_only=True).live(ADAPTER, 1)
    assert set(live.indices) == set(every) - set(outside_trains(ADAPTER))
    assert FedTT().live(ADAPTER, 1).indices == every
