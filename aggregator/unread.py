"""Answers that nobody reads: what a connection holds of them is bounded, and so is the time they wait."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import sys
from collections.abc import Callable
from typing import Any

__all__ = ["Unread", "hold_little", "keep_little_unsent"]

_READ_BYTES = 1 << 14  #: of requests at a time; they wait where the one before is not answered yet
_UNSENT_BYTES = 1 << 17  #: that the kernel takes beyond what is on its way
_LEAST_BYTES = 1 << 14  #: that must be taken in the time after which a connection is cut off
_LOOKS = 10  #: at a connection, in the time after which it is cut off
#: tcp_info of linux/tcp.h: unacked (packets), bytes_acked, notsent_bytes
_TOLD = struct.Struct("=24xI92xQ16xI")
_AT_ONCE = struct.pack("ii", 1, 0)  #: SO_LINGER: what is unsent is forgotten, and the other end told so


def keep_little_unsent(listener: socket.socket) -> None:
    """For each connection that it will accept the kernel would else take some megabytes."""
    if sys.platform == "linux":
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, _UNSENT_BYTES)


def hold_little(transport: Any) -> None:
    """Let whoever writes wait until the kernel has taken all, and read a little at a time.

    asyncio by itself lets 64 KiB wait, twice that over TLS, and reads 256 KiB, over TLS also ahead.
    """
    transport.set_write_buffer_limits(high=1)
    if transport.get_extra_info("sslcontext") is not None:
        transport.set_read_buffer_limits(high=2 * _READ_BYTES, low=_READ_BYTES)  # a record is in the former
        tls = transport._ssl_protocol  # nothing else leads there
        tls.max_size, tls._ssl_buffer = _READ_BYTES, bytearray(_READ_BYTES)  # else as large as 256 KiB
        tls._ssl_buffer_view = memoryview(tls._ssl_buffer)
        transport = tls._transport
        transport.set_write_buffer_limits(high=0)
    transport.max_size = _READ_BYTES


class Unread:
    """Cuts a connection off whose other end takes next to nothing of what is there, be it closed here or not.

    Any progress at all would not do: a kernel whose buffers are full may still take a little.

    The kernel is asked, who alone knows: of files that it sends, of TLS and of other answers alike. Only
    Linux tells; elsewhere nothing is cut off.
    """

    __slots__ = ("_acked", "_late", "_loop", "_moved_at", "_socket", "_timer", "_within_s", "answering")

    def __init__(self, connection: Any, within_s: float, late: Callable[[], None]) -> None:
        """connection: its socket. within_s: for which nothing may be taken. late: told where that is over."""
        self._socket, self._within_s, self._late = connection, within_s, late
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self._acked, self._moved_at = -1, 0.0
        self.answering = False  #: whether there is more to come than the kernel knows of

    def watch(self) -> None:
        """Until all is taken; an answer begins."""
        self.answering = True
        if self._timer is None and sys.platform == "linux":
            self._acked = -1
            self._look_later()

    def stop(self) -> None:
        """The connection is gone."""
        if self._timer is not None:
            self._timer.cancel()

    def _look_later(self) -> None:
        self._timer = self._loop.call_later(self._within_s / _LOOKS, self._look)

    def _look(self) -> None:
        self._timer = None
        if self._socket.fileno() < 0:
            return  # closed a moment ago
        told = self._socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TOLD.size)
        unacked, acked, unsent = _TOLD.unpack(told.ljust(_TOLD.size, b"\0"))
        is_left = unacked or unsent
        if not is_left and not self.answering:
            return
        now = self._loop.time()
        if self._acked < 0 or acked - self._acked >= _LEAST_BYTES or not is_left:
            self._acked, self._moved_at = acked, now
        elif now - self._moved_at >= self._within_s:
            self._cut_off()
            return
        self._look_later()

    def _cut_off(self) -> None:
        """As if the other end had hung up: whoever writes learns it from the kernel, sending files or not."""
        self._late()
        with contextlib.suppress(OSError):  # it did hang up
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _AT_ONCE)
            self._socket.shutdown(socket.SHUT_RDWR)
