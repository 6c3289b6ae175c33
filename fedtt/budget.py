"""What one lease may take of a device: a task says the most in its plans, an owner for all tasks."""

from __future__ import annotations

from typing import Annotated, TypeVar

from msgspec import Meta, Struct

__all__ = ["Budget"]

N = TypeVar("N", int, float)

Bytes = Annotated[int, Meta(ge=1, le=2**50)]


class Budget(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The most that a training may take; None where nothing is said."""

    memory_mb: Annotated[int, Meta(ge=1, le=10**9)] | None = None  #: MiB; who has less free does not begin
    time_s: Annotated[float, Meta(gt=0, le=30 * 86400)] | None = None  #: of training, by the clock
    download_bytes: Bytes | None = None  #: what is missing of the bundle, and a version where none is held
    upload_bytes: Bytes | None = None  #: the longest frame

    def within(self, other: Budget) -> Budget:
        """The tighter of both, one by one."""
        return Budget(
            memory_mb=_least(self.memory_mb, other.memory_mb),
            time_s=_least(self.time_s, other.time_s),
            download_bytes=_least(self.download_bytes, other.download_bytes),
            upload_bytes=_least(self.upload_bytes, other.upload_bytes),
        )


def _least(a: N | None, b: N | None) -> N | None:
    if a is None or b is None:
        return b if a is None else a
    return min(a, b)
