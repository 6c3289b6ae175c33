"""How many connections the devices' listener keeps, in all and for each range of addresses."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable

from msgspec import Struct

from aggregator.limits import address_range

__all__ = ["ConnectionLimits", "Connections"]


class ConnectionLimits(Struct, frozen=True, kw_only=True):
    """What is kept open at a time; a connection beyond it is closed before a byte of it is read."""

    total: int = 16_000  #: each is an open file
    addresses: int | None = 2_000  #: from one range of addresses; None for any number


class Connections:
    """The connections of one listener that are open now; of this very machine only the total counts."""

    def __init__(self, limits: ConnectionLimits, refused: Callable[[str], None]) -> None:
        """refused: told for each connection that is closed which limit it met, `total` or `addresses`."""
        self._limits, self._refused = limits, refused
        self._ranges: Counter[str | None] = Counter()
        self.open = 0

    def admit(self, name: str | None) -> bool:
        """Take a connection from a range of addresses (None for this machine), unless there are too many."""
        if self.open >= self._limits.total:
            self._refused("total")
            return False
        most = self._limits.addresses
        if name is not None and most is not None and self._ranges[name] >= most:
            self._refused("addresses")
            return False
        self.open += 1
        self._ranges[name] += 1
        return True

    def ended(self, name: str | None) -> None:
        self.open -= 1
        self._ranges[name] -= 1
        if not self._ranges[name]:
            del self._ranges[name]

    def counted(self, protocol: asyncio.Protocol) -> asyncio.Protocol:
        """A connection's protocol, reached only by one that is admitted."""
        return _Counted(protocol, self)


class _Counted(asyncio.Protocol):
    def __init__(self, protocol: asyncio.Protocol, connections: Connections) -> None:
        self._connections, self._admitted = connections, False
        self._range: str | None = None
        self._protocol = protocol
        self.data_received = protocol.data_received  # type: ignore[method-assign]  # straight through
        self.eof_received = protocol.eof_received  # type: ignore[method-assign]
        self.pause_writing = protocol.pause_writing  # type: ignore[method-assign]
        self.resume_writing = protocol.resume_writing  # type: ignore[method-assign]

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        peer = transport.get_extra_info("peername")
        self._range = address_range(peer[0] if peer else None)
        self._admitted = self._connections.admit(self._range)
        if self._admitted:
            self._protocol.connection_made(transport)
        elif isinstance(transport, asyncio.Transport):
            transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._admitted:
            self._connections.ended(self._range)
            self._protocol.connection_lost(exc)
