from __future__ import annotations

from edge_client.backoff import Backoff


def test_waits_stay_below_a_ceiling_that_doubles_up_to_the_limit() -> None:
    ceilings = [1, 2, 4, 8, 10, 10]
    for device in range(200):
        backoff = Backoff(device=device, first_s=1, limit_s=10)
        assert all(0 <= backoff.failed() <= ceiling for ceiling in ceilings)


def test_a_crowd_spreads_over_the_whole_ceiling() -> None:
    waits = [Backoff(device=device, first_s=100, limit_s=100).failed() for device in range(1000)]
    assert min(waits) < 5
    assert max(waits) > 95
    assert (
        45 < sum(waits) / len(waits) < 55
    )  # uniform on 0..100: mean 50, standard error 100/sqrt(12*1000) = 0.9


def test_the_time_a_server_names_is_waited_in_full() -> None:
    assert all(30 <= Backoff(device=d, first_s=1).failed(at_least_s=30) <= 31 for d in range(100))


def test_success_begins_anew_with_other_draws() -> None:
    backoff = Backoff(device=1, first_s=1, limit_s=1000)
    first = backoff.failed()
    for _ in range(9):
        backoff.failed()
    backoff.succeeded()
    again = backoff.failed()
    assert again <= 1
    assert again != first


def test_the_same_device_draws_the_same_waits() -> None:
    one, other = Backoff(device=5, seed=1), Backoff(device=5, seed=1)
    assert [one.failed() for _ in range(5)] == [other.failed() for _ in range(5)]


def test_very_many_failures_do_not_overflow() -> None:
    backoff = Backoff(device=0, limit_s=600)
    assert all(backoff.failed() <= 600 for _ in range(2000))


def test_work_without_a_receipt_is_counted_by_itself_until_one_comes() -> None:
    ceilings = [1, 2, 4, 8, 10, 10]
    for device in range(100):
        backoff = Backoff(device=device, first_s=1, limit_s=10)
        for ceiling in ceilings:
            assert 0 <= backoff.fruitless() <= ceiling
            assert backoff.asked(30.0) == 30.0
            assert backoff.failed() <= 1
        backoff.succeeded()
        assert backoff.fruitless() <= 1


def test_short_waits_grow_up_to_a_second_as_they_repeat_and_long_ones_are_as_asked_for() -> None:
    backoff = Backoff(device=0)
    assert [backoff.asked(0.0) for _ in range(12)] == [*(2**n / 1000 for n in range(10)), 1.0, 1.0]
    assert (backoff.asked(1.5), backoff.asked(0.5)) == (1.5, 1.0)
    backoff.succeeded()
    assert [backoff.asked(0.05) for _ in range(6)] == [0.05] * 6
