"""Token buckets against a slow count of what passed, and whom an address stands for."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aggregator import limits
from aggregator.limits import Buckets, Rate, address_range


@given(st.lists(st.floats(0, 3), max_size=60), st.integers(1, 5), st.sampled_from([0.5, 1.0, 4.0]))
def test_no_stretch_of_time_sees_more_than_the_burst_and_the_rate(
    pauses: list[float], burst: int, per_s: float
) -> None:
    buckets, now, passed = Buckets(Rate(per_s=per_s, burst=burst)), 0.0, list[float]()
    for pause in pauses:
        now += pause
        wait_s = buckets.take("a", now)
        if wait_s == 0:
            passed.append(now)
        else:
            assert 0 < wait_s <= 1 / per_s
            assert Buckets(None).take("a", now) == 0
    for first in range(len(passed)):
        for last in range(first, len(passed)):
            allowed = burst + per_s * (passed[last] - passed[first])
            assert last - first + 1 <= allowed + 1e-6


def test_whoever_waits_as_long_as_told_is_let_through_and_others_never_wait_for_him() -> None:
    buckets = Buckets(Rate(per_s=2, burst=3))
    assert [buckets.take("a", 10.0) for _ in range(4)] == [0, 0, 0, 0.5]
    assert buckets.take("b", 10.0) == 0
    assert buckets.take("a", 10.5) == 0
    assert buckets.take("a", 10.0) > 0  # a clock that goes back refills nothing


def test_memory_is_bounded_and_the_longest_unused_goes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "_KEPT", 10)
    buckets = Buckets(Rate(per_s=1e-9, burst=1))
    assert buckets.take("first", 0.0) == 0
    for number in range(9):
        buckets.take(str(number), 0.0)
    assert buckets.take("first", 0.0) > 0
    for number in range(9, 19):
        buckets.take(str(number), 0.0)
    assert buckets.take("first", 0.0) == 0
    assert len(buckets._levels) == 10


@pytest.mark.parametrize(
    ("peer", "forwarded", "expected"),
    [
        ("198.51.100.7", None, "198.51.100.0/24"),
        ("::ffff:198.51.100.7", None, "198.51.100.0/24"),
        ("2001:db8:1:2ff::1", None, "2001:db8:1:200::/56"),
        ("fe80::1%eth0", None, "fe80::/56"),
        ("127.0.0.1", None, None),
        ("::1", None, None),
        (None, None, "unknown"),
        ("127.0.0.1", "198.51.100.7", "198.51.100.0/24"),
        ("127.0.0.1", "203.0.113.9, 198.51.100.7", "198.51.100.0/24"),  # the first is the client's own word
        ("127.0.0.1", "nonsense", "unknown"),
    ],
)
def test_an_address_stands_for_its_range(
    peer: str | None, forwarded: str | None, expected: str | None
) -> None:
    assert address_range(peer, forwarded) == expected
