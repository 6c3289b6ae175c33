"""How many connections the devices' listener keeps, in all and for each range of addresses."""

from __future__ import annotations

import os
import socket
from collections import Counter
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from msgspec import Struct

from aggregator.limits import address_range

__all__ = ["ConnectionLimits", "Connections"]

_REFUSED_AT_ONCE = 1024


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

    def listen(self, bound: Iterable[socket.socket]) -> list[socket.socket]:
        """The same sockets again, whose connections are counted from the moment the kernel gives them.

        A handshake of TLS that is never finished counts like any other connection.
        """
        return [_Listener(self, each) for each in bound]


class _Listener(socket.socket):
    """Takes connections as long as there is room for them."""

    def __init__(self, connections: Connections, bound: socket.socket) -> None:
        super().__init__(bound.family, bound.type, bound.proto, fileno=os.dup(bound.fileno()))
        self._connections = connections

    def accept(self) -> tuple[socket.socket, Any]:
        """The next that there is room for; the others are closed, a crowd of them in one turn of the loop."""
        for _ in range(_REFUSED_AT_ONCE):
            descriptor, peer = self._accept()  # type: ignore[attr-defined]  # as its base class does
            name = address_range(peer[0] if peer else None)
            if self._connections.admit(name):
                accepted = _Connection(self.family, self.type, self.proto, fileno=descriptor)
                accepted.ended = partial(self._connections.ended, name)
                return accepted, peer
            os.close(descriptor)
        raise BlockingIOError  # others have their turn, then the loop looks again


class _Connection(socket.socket):
    """Counts until it is closed."""

    ended: Callable[[], None] | None = None

    def close(self) -> None:
        ended, self.ended = self.ended, None
        if ended is not None:
            ended()
        super().close()

    def __del__(self) -> None:
        """Where its transport never came about."""
        self.close()
