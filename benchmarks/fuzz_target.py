"""What a target of `benchmarks.fuzz` is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

from fedtt.errors import FedttError, WireError

__all__ = ["Target", "law"]


class Target(NamedTuple):
    """One decoder."""

    take: Callable[[bytes], object]
    sound: tuple[bytes, ...]  #: which it takes
    refusal: type[FedttError] = WireError  #: its one way to say no
    share: int = 1  #: of the time: thrice where its decoder is slow


@contextmanager
def law() -> Iterator[None]:
    """About what was taken: a refusal within is none of the bytes that came, and so a finding."""
    try:
        yield
    except FedttError as error:
        raise AssertionError(f"what was taken is refused when written again: {error}") from error
