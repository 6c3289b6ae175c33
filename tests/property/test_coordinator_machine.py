"""The coordinator's state machine over the in-memory store (over SQL: tests/contract)."""

from __future__ import annotations

from hypothesis import HealthCheck, settings

from storage.memory import MemoryStore
from tests.property.machine import CoordinatorMachine


class MemoryMachine(CoordinatorMachine):
    make_store = staticmethod(MemoryStore)


TestCoordinatorOverMemory = MemoryMachine.TestCase
TestCoordinatorOverMemory.settings = settings(
    max_examples=500, stateful_step_count=30, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
