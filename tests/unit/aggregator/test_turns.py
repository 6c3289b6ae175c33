"""Who has a seat in a round, and when those are told to come who have none."""

from __future__ import annotations

from msgspec.structs import replace

from fedtt.messages import Receipt, Wait, Work
from fedtt.sampling import next_turn
from storage.records import Round
from tests.unit.aggregator.test_coordinator import Server


def test_seats_are_kept_for_the_sample_until_a_quarter_of_the_deadline_has_passed() -> None:
    server = Server(cohort=1, deadline_s=40.0)
    devices = [server.device(n) for n in range(1, 6)]
    with server.store.transaction() as tx:  # all have been seen before the first round is opened
        for device in devices:
            row = tx.device(device)
            assert row is not None
            tx.put_device(replace(row, examples=1, runtimes=("onnxruntime",)))
        round_ = server.coordinator.lifecycle.ensure_round(tx, 0.0, server.task)
    assert round_ is not None
    (invited,) = round_.invited
    others = [device for device in devices if device != invited]
    assert all(isinstance(server.check_in(device, now=9.0), Wait) for device in others)
    assert isinstance(server.check_in(others[0], now=10.0), Work)
    assert isinstance(server.check_in(invited, now=11.0), Wait)


def test_a_device_that_is_not_drawn_is_told_when_its_turn_may_come() -> None:
    """Where rounds follow each other by 10 s; in a first one, and after one slow to fill, by retry_s."""
    server = Server(cohort=1, count=99, deadline_s=400.0, retry_s=8.0)
    devices = [server.device(n) for n in range(1, 9)]
    first = server.work(devices[0], now=0.0)
    assert all(4 <= wait_of(server, device, 1.0) < 12 for device in devices[1:])
    assert isinstance(server.upload(devices[0], first.lease, now=2.0), Receipt)
    server.fold(now=10.0)
    (second,) = one_round(server, 10.0).invited
    with server.store.reading() as tx:
        assert [r.drawn_from for r in tx.rounds(server.task.id)] == [8, 1]  # the newest first
    for device in devices:
        if device != second:
            turn = next_turn(server.task.draw_key, device, 2, 1, 8)
            soonest, latest = (5.0, 7.5) if turn > 3 else (0.0, 0.0)
            told = wait_of(server, device, 10.0)
            assert max(4.0, soonest * (turn - 2)) <= told < max(12.0, latest * (turn - 2))
    assert isinstance(server.upload(second, server.work(second, 109.0).lease, now=109.5), Receipt)
    server.fold(now=110.0)
    one_round(server, 110.0)
    (third,) = one_round(server, 110.0).invited
    assert all(4 <= wait_of(server, device, 110.0) < 12 for device in devices if device != third)


def wait_of(server: Server, device: str, now: float) -> float:
    answer = server.check_in(device, now)
    assert isinstance(answer, Wait)
    return answer.retry_after_s


def one_round(server: Server, now: float) -> Round:
    with server.store.transaction() as tx:
        round_ = server.coordinator.lifecycle.ensure_round(tx, now, server.task)
    assert round_ is not None
    return round_
