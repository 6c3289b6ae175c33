"""What `fedtt doctor` finds."""

from __future__ import annotations

from msgspec import Struct

__all__ = ["Finding"]


class Finding(Struct, frozen=True, kw_only=True):
    """One thing looked at."""

    name: str
    ok: bool
    said: str
    fix: str = ""  #: what to do where it is not
