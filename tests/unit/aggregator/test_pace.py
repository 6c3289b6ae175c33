"""A crowd whose check-ins find no room is told to return as spread out as those that found some."""

from __future__ import annotations

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from aggregator.app import device_app
from aggregator.coordinator import IDLE_RETRY_S
from aggregator.pace import Pace
from aggregator.service import Service
from edge_client.http_transport import HttpTransport
from edge_client.identity import Identity
from fedtt.errors import Refused
from fedtt.messages import Code, Wait
from fedtt.seams import SystemClock
from storage.blobs import MemoryBlobs
from storage.memory import MemoryStore
from tests.support.in_process import listening
from tests.support.ledger import device as known_device
from tests.support.served import CHECK_IN

DEVICES = [f"{number * 0x9E3779B97F4A7C15 % 2**64:016x}" + "0" * 16 for number in range(1000)]


def test_before_anybody_was_told_devices_return_as_where_there_is_no_task() -> None:
    again_s = [Pace().again_s(0.0, device) for device in DEVICES]
    assert 0.5 * IDLE_RETRY_S <= min(again_s) < 0.6 * IDLE_RETRY_S
    assert 1.4 * IDLE_RETRY_S < max(again_s) <= 1.5 * IDLE_RETRY_S


def test_devices_return_in_the_mean_when_those_before_them_were_told_to() -> None:
    pace = Pace()
    for number in range(1000):
        pace.told(10.0 if number % 2 else 30.0)
    again_s = [pace.again_s(0.0, device) for device in DEVICES]
    assert sum(again_s) / len(again_s) == pytest.approx(20.0, rel=0.05)
    assert min(again_s) < 11 < 29 < max(again_s)


def test_nobody_is_refused_for_hours_because_the_turn_of_others_is_far() -> None:
    pace = Pace()
    for _ in range(1000):
        pace.told(6 * 3600.0)
    assert min(pace.again_s(0.0, device) for device in DEVICES) >= 300
    assert max(pace.again_s(0.0, device) for device in DEVICES) <= 900


async def test_a_check_in_that_finds_no_room_is_told_the_pace_of_those_that_found_some() -> None:
    identity = Identity(Ed25519PrivateKey.generate())
    service = Service(MemoryStore(), MemoryBlobs(), SystemClock(), queue_limit=0)
    with service.store.transaction() as tx:
        tx.put_device(known_device(id=identity.device, public_key=identity.public_key))
    for _ in range(1000):
        service.pace.told(600.0)
    async with listening(device_app(service)) as url:
        transport = HttpTransport(url, identity, SystemClock())
        with pytest.raises(Refused) as caught:
            await transport.check_in(CHECK_IN)
        await transport.close()
    assert caught.value.problem.code is Code.BUSY
    assert 300 <= (caught.value.retry_after_s or 0) <= 900


async def test_what_a_device_is_told_to_wait_sets_the_pace() -> None:
    identity = Identity(Ed25519PrivateKey.generate())
    service = Service(MemoryStore(), MemoryBlobs(), SystemClock())
    with service.store.transaction() as tx:
        tx.put_device(known_device(id=identity.device, public_key=identity.public_key))
    service.writer.start()
    before_s = service.pace.again_s(0.0, identity.device)
    answer = await service.check_in(identity.device, CHECK_IN)
    await service.writer.stop()
    assert isinstance(answer, Wait)
    assert service.pace.again_s(0.0, identity.device) != before_s
