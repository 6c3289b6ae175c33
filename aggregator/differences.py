"""Differences between versions: computed once for all who ask, one at a time, beside the event loop."""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict

from aggregator.inline import Aside
from fedtt.codec.difference import encode_difference
from fedtt.errors import StorageError
from fedtt.wire import zeros_digest
from storage.blobs import BlobStore, load

__all__ = ["LIMIT_BYTES", "Differences"]

LIMIT_BYTES = 32 << 20  #: of differences kept in memory
_ENTRY_BYTES = 512  #: what an entry costs beside its bytes
_log = logging.getLogger("fedtt.aggregator")


class Differences:
    """The differences asked for last; the devices of a round mostly hold one of few versions."""

    def __init__(
        self, blobs: BlobStore, limit_bytes: int = LIMIT_BYTES, *, aside: Aside = asyncio.to_thread
    ) -> None:
        self._blobs, self._limit_bytes, self._aside = blobs, limit_bytes, aside
        self._kept: OrderedDict[tuple[str, str], bytes | None] = OrderedDict()
        self._kept_bytes = 0
        self._one_at_a_time = asyncio.Lock()

    async def between(self, base: str, new: str) -> bytes | None:
        """The difference of two versions, by their sha256; None where the whole is as short.

        Raises StorageError where `new` is missing or damaged.
        """
        pair = (base, new)
        if pair in self._kept:
            self._kept.move_to_end(pair)
            return self._kept[pair]
        async with self._one_at_a_time:
            if pair not in self._kept:
                self._keep(pair, await self._aside(_difference, self._blobs, base, new))
            return self._kept[pair]

    def _keep(self, pair: tuple[str, str], difference: bytes | None) -> None:
        """Keep one more; the longest unused make room for it."""
        self._kept[pair] = difference
        self._kept_bytes += _cost(difference)
        while self._kept_bytes > self._limit_bytes and len(self._kept) > 1:
            _, dropped = self._kept.popitem(last=False)
            self._kept_bytes -= _cost(dropped)


def _cost(difference: bytes | None) -> int:
    return _ENTRY_BYTES + len(difference or b"")


def _difference(blobs: BlobStore, base: str, new: str) -> bytes | None:
    whole = load(blobs, new)
    try:
        held = bytes(len(whole)) if base == zeros_digest(len(whole)) else load(blobs, base)
    except StorageError as error:
        _log.error("devices that hold an older version get the newer one whole: %s", error)
        return None
    if len(held) != len(whole):
        return None
    difference = encode_difference(held, whole)
    return difference if len(difference) < len(whole) else None
