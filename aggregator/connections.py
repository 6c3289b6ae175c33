"""How many connections a listener keeps, in all and for each range of addresses."""

from __future__ import annotations

import os
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from msgspec import Struct

from aggregator.limits import address_range

__all__ = ["ConnectionLimits", "Connections"]

_REFUSED_AT_ONCE = 1024


class ConnectionLimits(Struct, frozen=True, kw_only=True):
    """What one process keeps open at a time; a connection beyond it is closed before a byte of it is read."""

    total: int = 16_000  #: each is an open file
    addresses: int | None = 2_000  #: from one range of addresses; None for any number


class Connections:
    """The connections of one listener that are open now; of this very machine only the total counts."""

    def __init__(
        self,
        limits: ConnectionLimits,
        refused: Callable[[str], None],
        *,
        handshake_s: float | None = None,
        idle: Callable[[str], None] = lambda _: None,
        failed: Callable[[], None] = lambda: None,
    ) -> None:
        """refused: told for each connection that is closed which limit it met, `total` or `addresses`.

        handshake_s: for TLS, after which asyncio closes a connection. idle: told of each such, `handshake`.
        failed: told of each other whose handshake did not come to its end.
        """
        self._limits, self._refused, self._idle, self._failed = limits, refused, idle, failed
        self._ranges: Counter[str | None] = Counter()
        self._shaking: dict[int, float] = {}  #: file descriptor -> when it was accepted
        self.handshake_s = handshake_s
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

    def accepted(self, descriptor: int) -> None:
        if self.handshake_s is not None:
            self._shaking[descriptor] = time.monotonic()

    def begun(self, descriptor: int) -> None:
        """Its handshake is over, and went well."""
        self._shaking.pop(descriptor, None)

    def closing(self, descriptor: int) -> None:
        """asyncio tells nobody why it closes a connection before its protocol has begun: its age does."""
        accepted_at = self._shaking.pop(descriptor, None)
        if accepted_at is None or self.handshake_s is None:
            return
        if time.monotonic() - accepted_at >= self.handshake_s:
            self._idle("handshake")
        else:
            self._failed()

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
                accepted.ended = partial(self._ended, name, descriptor)
                self._connections.accepted(descriptor)
                return accepted, peer
            os.close(descriptor)
        raise BlockingIOError  # others have their turn, then the loop looks again

    def _ended(self, name: str | None, descriptor: int) -> None:
        self._connections.closing(descriptor)
        self._connections.ended(name)


class _Connection(socket.socket):
    """Counts until it is closed; the number of its descriptor is its own until then."""

    ended: Callable[[], None] | None = None

    def close(self) -> None:
        ended, self.ended = self.ended, None
        if ended is not None:
            ended()
        super().close()

    def __del__(self) -> None:
        """Where its transport never came about."""
        self.close()
