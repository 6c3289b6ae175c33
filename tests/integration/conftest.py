"""A server under attack: one for each file that asks for it, with an update acknowledged before it begins."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from fedtt.messages import UpdateState
from tests.support.served import Attacked, Peer, frame_of, served, task_text


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def place(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Attacked]:
    directory = tmp_path_factory.mktemp("server")
    async with served(directory, task_text(), idle_s=0.5, body_s=0.3) as server, server.device() as honest:
        work = await honest.work()
        frame = frame_of(work.plan)
        yield Attacked(server, honest, await honest.transport.upload(work.lease, frame), frame)


@pytest_asyncio.fixture(loop_scope="module")
async def nothing_accepted_is_lost(place: Attacked) -> AsyncIterator[None]:
    yield
    assert place.receipt.state is UpdateState.ACCEPTED
    assert await place.honest.transport.receipt(place.receipt.lease) == place.receipt
    assert await place.honest.transport.upload(place.receipt.lease, place.frame) == place.receipt


@pytest_asyncio.fixture(loop_scope="module")
async def device(place: Attacked) -> AsyncIterator[Peer]:
    async with place.server.device() as peer:
        yield peer
