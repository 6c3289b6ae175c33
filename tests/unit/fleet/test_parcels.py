"""Trainings and their outcomes as bytes: the same on the other side, and what is shared goes once."""

from __future__ import annotations

from pathlib import Path

import pytest
from msgspec.structs import replace

from edge_client.bundle import Bundle
from edge_client.examples import Example, Shard
from edge_client.trainer import LocalUpdate, TrainingRequest
from fedtt.errors import BundleError, DataError, FedttError, LayoutError, RuntimeFailure, WireError
from fedtt.wire import UpdateHeader
from fleet.parcels import (
    Updated,
    answer_of,
    decode_answers,
    decode_work,
    encode_answers,
    encode_work,
    update_of,
)
from tests.support.edge import WORDS, small_bundle
from tests.support.requests import requests_of

UPDATE = LocalUpdate(
    frame=b"frame",
    residual=b"rest",
    header=UpdateHeader(layout=b"12345678", examples=3, steps=2, loss_first=2.0, loss_last=1.5),
    cut_texts=1,
)


class Given:
    """A handle whose outcome is known."""

    def __init__(self, outcome: LocalUpdate | Exception) -> None:
        self._outcome = outcome

    def result(self) -> LocalUpdate:
        if isinstance(self._outcome, Exception):
            raise self._outcome
        return self._outcome

    def cancel(self) -> None:
        """Nothing is under way."""


def same(one: TrainingRequest, other: TrainingRequest) -> bool:
    """Requests compare by identity; this is by what they hold."""
    return all(
        getattr(one, name) == getattr(other, name)
        for name in ("plan", "device", "bundle", "version", "residual")
    ) and list(one.examples.read()) == list(other.examples.read())


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return small_bundle(tmp_path / "bundle")


def test_requests_arrive_as_they_were_sent_in_their_order(bundle: Bundle) -> None:
    first, second, third = requests_of(bundle, WORDS, (3, 1, 2))
    pair = Example("lights on", "on", source="row 3", text_pair="off")
    sent = [
        third,
        replace(first, residual=b"\x01\x02", plan=replace(first.plan, round=7)),
        replace(second, examples=Shard([pair]), version=b"other", plan=replace(first.plan, version="f" * 64)),
    ]
    found = decode_work(encode_work(sent), bundle)
    assert len(found) == 3
    assert all(same(one, other) for one, other in zip(found, sent, strict=True))


def test_what_many_share_travels_once(bundle: Bundle) -> None:
    (request,) = requests_of(bundle, WORDS, (1,))
    large = replace(request, version=bytes(100_000))
    one, many = len(encode_work([large])), len(encode_work([large] * 50))
    assert many - one < 50 * 300


@pytest.mark.parametrize("error", [BundleError, DataError, LayoutError, RuntimeFailure, WireError])
def test_errors_of_training_arrive_as_they_were_raised(error: type[FedttError]) -> None:
    updated, failed = decode_answers(encode_answers([Given(UPDATE), Given(error("too few examples"))]))
    assert updated == Updated(UPDATE)
    assert update_of(updated) == UPDATE
    with pytest.raises(error, match=r"^too few examples$"):
        update_of(failed)


def test_other_errors_are_nobodys_answer() -> None:
    with pytest.raises(ZeroDivisionError):
        answer_of(Given(ZeroDivisionError()))
