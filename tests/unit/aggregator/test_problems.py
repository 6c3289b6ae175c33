"""Refusals fit the protocol whatever they quote."""

from __future__ import annotations

import pytest

from aggregator import problems
from fedtt.messages import STATUS, Code, Problem, decode, encode

LONG = "x" * 5000
ALL = [
    problems.bad_signature("why"),
    problems.bad_token(),
    problems.busy("why"),
    problems.clock_skew(0.0, 1e9),
    problems.conflict("0" * 32),
    problems.conflict_name("a" * 63),
    problems.conflict_state("a" * 63, "finished", "resumed"),
    problems.forbidden(),
    problems.internal(),
    problems.malformed(LONG),
    problems.not_allowed(LONG, "/" * 100, "GET, POST"),
    problems.not_found(LONG),
    problems.stale("why"),
    problems.storage_failed(LONG),
    problems.storage_failed(""),
    problems.too_large(10),
    problems.unknown_device(),
    problems.unknown_lease(LONG),
]


@pytest.mark.parametrize("problem", ALL, ids=lambda problem: problem.code.value)
def test_a_refusal_is_a_message_the_protocol_allows(problem: Problem) -> None:
    assert decode(encode(problem), Problem) == problem
    assert problem.detail


def test_every_code_has_a_status() -> None:
    assert set(STATUS) == set(Code)
    assert all(400 <= status < 600 for status in STATUS.values())
