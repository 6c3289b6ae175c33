"""Exact FedTT with buffered asynchrony: what a late update means."""

from __future__ import annotations

import numpy as np
import pytest

from fedtt.algorithms import ExactFedTT
from tests.support.trains import cores_of, dense_matrices, random_theta
from tests.unit.fedtt.algorithms.test_exact_fedtt import (
    ADAPTER,
    HEAD,
    at_device,
    distance,
    folded,
    live_at,
    some_deltas,
)


@pytest.mark.parametrize("orthogonal", [False, True])
def test_an_update_from_an_older_base_of_its_epoch_is_folded_exactly(orthogonal: bool) -> None:
    """Only the live set has moved since, so the frozen cores, and with them the coordinates, are the same."""
    method = ExactFedTT(epoch_rounds=2, orthogonal=orthogonal)
    old, live = random_theta(ADAPTER, 0), live_at(method, 1)
    new = folded(method, old, live, some_deltas(live, 1)).theta
    (late,) = some_deltas(live, 2, count=1)
    found = dense_matrices(ADAPTER, folded(method, new, live, [late]).theta)
    at_old, at_late = (dense_matrices(ADAPTER, at) for at in (old, at_device(method, old, live, late.delta)))
    base = dense_matrices(ADAPTER, new)
    assert distance(found, {n: base[n] + at_late[n] - at_old[n] for n in base}) < 1e-5


@pytest.mark.parametrize("orthogonal", [False, True])
def test_a_late_update_of_its_epoch_with_a_whole_head_is_exact_but_for_the_head(orthogonal: bool) -> None:
    """All of the head has moved since, so there it counts core by core, as a late update of FedTT does."""
    method = ExactFedTT(epoch_rounds=2, whole_head=True, orthogonal=orthogonal)
    old, live = random_theta(ADAPTER, 0), live_at(method, 1)
    new = folded(method, old, live, some_deltas(live, 1)).theta
    (late,) = some_deltas(live, 2, count=1)
    after = folded(method, new, live, [late]).theta
    found, base = dense_matrices(ADAPTER, after), dense_matrices(ADAPTER, new)
    at_old, at_late = (dense_matrices(ADAPTER, at) for at in (old, at_device(method, old, live, late.delta)))
    meant = {n: base[n] + at_late[n] - at_old[n] for n in base}
    assert distance({HEAD: found.pop(HEAD)}, {HEAD: meant.pop(HEAD)}) > 0.05
    assert distance(found, meant) < 1e-5
    plain = cores_of(ADAPTER, new + live.scatter(late.delta), HEAD)
    for one, moved in zip(cores_of(ADAPTER, after, HEAD), plain, strict=True):
        np.testing.assert_allclose(one, moved, rtol=1e-6, atol=1e-6)
    assert method.same_gauge(1, 2)
    assert not method.same_gauge(2, 3)


@pytest.mark.parametrize("orthogonal", [False, True])
def test_an_update_from_an_epoch_of_long_ago_would_mean_something_else(orthogonal: bool) -> None:
    """The same live set after a whole turn; therefore it is refused."""
    method = ExactFedTT(orthogonal=orthogonal)
    old = new = random_theta(ADAPTER, 0)
    for t in range(1, 6):
        turn = live_at(method, t)
        new = folded(method, new, turn, some_deltas(turn, t, scale=0.5)).theta
    live = live_at(method, 6)
    assert set(live_at(method, 1).indices) & set(live.indices)
    (late,) = some_deltas(live, 9, count=1)
    found = dense_matrices(ADAPTER, folded(method, new, live, [late]).theta)
    at_old, at_late = (dense_matrices(ADAPTER, at) for at in (old, at_device(method, old, live, late.delta)))
    base = dense_matrices(ADAPTER, new)
    meant = {n: at_late[n] - at_old[n] for n in base}
    assert distance({n: found[n] - base[n] for n in base}, meant) > 0.2
    assert not method.same_gauge(1, 6)
