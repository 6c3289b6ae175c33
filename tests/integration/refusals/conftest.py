"""The server of the refusal matrix, on each database, and a device that has a lease there."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from tests.support.matrix import DATABASES, Place, Rows, on_database, with_a_lease
from tests.support.served import Served


@pytest_asyncio.fixture(loop_scope="module", scope="module", params=DATABASES)
async def server(
    tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> AsyncIterator[tuple[Served, Rows]]:
    async with on_database(tmp_path_factory.mktemp("refusals"), request.param) as started:
        yield started


@pytest_asyncio.fixture(loop_scope="module")
async def place(server: tuple[Served, Rows]) -> AsyncIterator[Place]:
    async with with_a_lease(server) as found:
        yield found
