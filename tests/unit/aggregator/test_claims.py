"""Where servers share a store, a claimed round is summed by who claimed it, or by another in its place."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from aggregator.claims import TAKE_OVER_S, Claims
from aggregator.lifecycle import Lifecycle
from storage.memory import MemoryStore
from storage.records import Round, RoundState
from storage.store import Transaction
from tests.support import ledger
from tests.support.clock import VirtualClock

CLAIMED = ledger.round_(1, state=RoundState.FOLDING)


class Shared(MemoryStore):
    is_shared = True


@pytest.fixture
def store() -> Iterator[Shared]:
    store = Shared()
    with store.transaction() as tx:
        ledger.open_round(tx)
    yield store
    store.close()


def claim(tx: Transaction) -> list[Round]:
    tx.put_round(CLAIMED)
    return [CLAIMED]


async def test_who_claims_a_round_sums_it_and_the_others_wait_until_it_takes_too_long(store: Shared) -> None:
    clock = VirtualClock(jump=False)
    mine, theirs = Claims(store, Lifecycle(), clock), Claims(store, Lifecycle(), clock)
    with store.transaction() as tx:
        folding, claimed = mine.noting(claim)(tx)
    mine.noted(claimed)
    assert mine.due(folding) == [CLAIMED]
    assert theirs.due(folding) == []
    await clock.advance(TAKE_OVER_S - 0.1)
    assert theirs.due(folding) == []
    await clock.advance(0.1)
    assert theirs.due(folding) == [CLAIMED]
    assert mine.due(folding) == [CLAIMED]  # its own goes on: one of the two is published
    assert theirs.due([]) == []
    assert theirs.due(folding) == []  # another round may have the place of one that is over


def test_a_round_that_was_claimed_before_is_not_ones_own(store: Shared) -> None:
    claims = Claims(store, Lifecycle(), VirtualClock())
    with store.transaction() as tx:
        claim(tx)
    with store.transaction() as tx:
        _, claimed = claims.noting(claim)(tx)
    assert claimed == set()


def test_a_server_that_is_alone_sums_at_once_what_another_left(store: Shared) -> None:
    alone = MemoryStore()
    with alone.transaction() as tx:
        ledger.open_round(tx)
        claim(tx)
    claims = Claims(alone, Lifecycle(), VirtualClock())
    assert claims.due([CLAIMED]) == [CLAIMED]
    alone.close()


@pytest.mark.parametrize("shared", [False, True])
async def test_a_sum_that_met_a_mistake_pauses_for_longer_each_time_and_keeps_no_other(shared: bool) -> None:
    store, clock = (Shared if shared else MemoryStore)(), VirtualClock(jump=False)
    claims, other = Claims(store, Lifecycle(), clock), ledger.round_(2, state=RoundState.FOLDING)
    claims.noted({(r.task_id, r.branch, r.number) for r in (CLAIMED, other)})
    folding = [CLAIMED, other]
    assert claims.due(folding) == folding
    for pause_s in (1, 2, 4, 8, 16, 32, 60, 60):
        claims.failed(CLAIMED)
        assert claims.due(folding) == [other]
        await clock.advance(pause_s - 0.1)
        assert claims.due(folding) == [other]
        await clock.advance(0.1)
        assert claims.due(folding) == folding
    claims.failed(CLAIMED)
    assert claims.due([other]) == [other]  # the round is over
    claims.noted({(CLAIMED.task_id, CLAIMED.branch, CLAIMED.number)})
    assert claims.due([CLAIMED]) == [CLAIMED]
    store.close()
