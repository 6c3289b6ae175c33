"""Check-ins that tell nothing again: what the coordinator makes of them."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from fedtt.messages import AsTold, CheckIn, CheckInAnswer, Code, Problem, Retired, Tell, Wait, Work
from storage.records import Device
from tests.unit.aggregator.test_coordinator import Server, code_of

FACTS = CheckIn(client="test", runtimes=("onnxruntime",), examples=5, memory_mb=512)


def ask(
    server: Server, device: str, message: CheckIn | AsTold, nonce: int | None = None, now: float = 0.0
) -> CheckInAnswer | Problem:
    with server.store.transaction() as tx:
        return server.coordinator.check_in(tx, now, device, message, nonce)


def row(server: Server, device: str) -> Device:
    with server.store.reading() as tx:
        found = tx.device(device)
    assert found is not None
    return found


def test_what_was_told_before_goes_on_as_if_it_were_told_again() -> None:
    server = Server()
    device = server.device(1)
    work = ask(server, device, FACTS, nonce=1)
    told = row(server, device)
    assert isinstance(work, Work)
    assert ask(server, device, FACTS.as_told(), nonce=2, now=3.0) == replace(
        work, expires_in_s=work.expires_in_s - 3, round_ends_in_s=57.0
    )
    assert row(server, device) == replace(told, seen_at=3.0, last_nonce=2)


def test_a_device_that_never_told_anything_is_asked_for_all_and_nothing_changes() -> None:
    server = Server()
    device = server.device(1)
    before = row(server, device)
    assert ask(server, device, FACTS.as_told(), nonce=1, now=3.0) == Tell()
    assert row(server, device) == before
    assert isinstance(ask(server, device, FACTS, nonce=2, now=3.0), Work)


@pytest.mark.parametrize(
    "changed",
    [
        replace(FACTS, client="test 2"),
        replace(FACTS, runtimes=("executorch", "onnxruntime")),
        replace(FACTS, examples=6),
        replace(FACTS, memory_mb=0),
    ],
    ids=["client", "runtimes", "examples", "memory_mb"],
)
def test_a_fact_that_changed_is_asked_for_and_known_from_then_on(changed: CheckIn) -> None:
    server = Server()
    device = server.device(1)
    ask(server, device, FACTS, nonce=1)
    before = row(server, device)
    assert ask(server, device, changed.as_told(), nonce=2, now=3.0) == Tell()
    assert row(server, device) == before
    assert isinstance(ask(server, device, changed, nonce=3), Work)
    assert isinstance(ask(server, device, changed.as_told(), nonce=4), Work)
    assert ask(server, device, FACTS.as_told(), nonce=5) == Tell()


def test_short_check_ins_are_replayed_as_little_as_full_ones() -> None:
    server = Server()
    device = server.device(1)
    assert ask(server, device, FACTS.as_told(), nonce=5) == Tell()
    assert ask(server, device, FACTS.as_told(), nonce=5) == Tell()  # which has used up no nonce
    ask(server, device, FACTS, nonce=6)
    before = row(server, device)
    for nonce in (5, 6):
        assert code_of(ask(server, device, FACTS.as_told(), nonce=nonce, now=9.0)) is Code.REPLAYED
    assert row(server, device) == before


def test_a_device_that_has_little_is_told_so_from_its_row() -> None:
    server = Server()
    device, little = server.device(1), replace(FACTS, examples=0)
    ask(server, device, little)
    answer = ask(server, device, little.as_told())
    assert isinstance(answer, Wait)
    assert answer.reason == "the task needs 1 examples, you have 0"


def test_a_device_that_left_or_was_erased_is_asked_for_nothing() -> None:
    server = Server()
    left, erased = server.device(1), server.device(2)
    for device in (left, erased):
        ask(server, device, FACTS)
        with server.store.transaction() as tx:
            server.coordinator.leave(tx, device, erase=device == erased)
    assert isinstance(ask(server, left, FACTS.as_told()), Retired)
    assert code_of(ask(server, erased, FACTS.as_told())) is Code.UNKNOWN_DEVICE
    assert code_of(ask(server, "0" * 32, FACTS.as_told())) is Code.UNKNOWN_DEVICE


def test_a_device_that_enrolled_anew_is_asked_for_all() -> None:
    server = Server()
    device = server.device(1)
    ask(server, device, FACTS)
    with server.store.transaction() as tx:
        server.coordinator.leave(tx, device, erase=False)
    assert server.device(1) == device
    assert ask(server, device, FACTS.as_told()) == Tell()
