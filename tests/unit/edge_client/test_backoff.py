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
