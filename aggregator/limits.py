"""How much one device or one range of addresses may ask for: token buckets, in memory and bounded.

Each process counts for itself: behind a balancer over n processes, n times as much passes. Addresses of this
very machine are not counted, for a proxy on it stands for everybody; it can say for whom (`forwarded`).
"""

from __future__ import annotations

import ipaddress
import resource
from collections import OrderedDict
from functools import lru_cache

from msgspec import Struct

__all__ = ["Buckets", "Rate", "Rates", "address_range", "raise_file_limit"]

_KEPT = 100_000  #: buckets; one that was not asked for longest is as good as full
_UNKNOWN = "unknown"  #: the range of a peer without an address


class Rate(Struct, frozen=True, kw_only=True):
    """What a bucket refills at, and holds."""

    per_s: float
    burst: int


class Rates(Struct, frozen=True, kw_only=True):
    """What the devices' listener allows; None for any amount."""

    key: Rate | None = Rate(per_s=50, burst=500)  #: requests signed by one device
    addresses: Rate | None = Rate(per_s=500, burst=5000)  #: requests from one range of addresses


class Buckets:
    """A bucket for each of many names, full at first."""

    def __init__(self, rate: Rate | None) -> None:
        self._rate = rate
        self._levels: OrderedDict[str, tuple[float, float]] = OrderedDict()  #: name -> level, when

    def take(self, name: str, now: float) -> float:
        """Take one from a bucket: 0, or where it is empty the seconds after which there is one."""
        rate = self._rate
        if rate is None:
            return 0.0
        level, at = self._levels.pop(name, (float(rate.burst), now))
        level = min(float(rate.burst), level + max(0.0, now - at) * rate.per_s)
        taken = level >= 1
        self._levels[name] = (level - taken, now)
        while len(self._levels) > _KEPT:
            self._levels.popitem(last=False)
        return 0.0 if taken else (1 - level) / rate.per_s


@lru_cache(maxsize=4096)
def address_range(peer: str | None, forwarded: str | None = None) -> str | None:
    """The /24 of an IPv4 address or the /56 of an IPv6 one, which one customer has; None for this machine.

    forwarded: value of X-Forwarded-For by a trusted proxy, whose last entry is whom the proxy saw.
    """
    text = forwarded.rpartition(",")[2].strip() if forwarded else peer
    try:
        address = ipaddress.ip_address((text or "").partition("%")[0])
    except ValueError:
        return _UNKNOWN
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped:
        address = address.ipv4_mapped
    if address.is_loopback:
        return None
    bits = 24 if address.version == 4 else 56
    return str(ipaddress.ip_network((address, bits), strict=False))


def raise_file_limit() -> int:
    """Let this process open as many files as it may, a connection being one; returns how many that is."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard
