"""Every error a person or a peer can cause, in one tree.

    FedttError
    ├── ConfigError      a task file, option or argument is nonsense
    ├── DataError        an examples file or an example is unusable
    ├── LayoutError      numbers do not fit the factor layout
    ├── BundleError      a bundle or version directory is missing, damaged or of another format
    ├── WireError        bytes from outside are not what the protocol allows
    │   └── ForeignWork       of work under a lease: to be given back
    ├── Refused          the other side answered with a typed `Problem`
    ├── Unreachable      the other side did not answer at all
    ├── Declined         conditions of the owner, or a budget of the task, forbid the work now
    ├── RuntimeFailure   the edge runtime could not load or run a graph
    └── StorageError     the database, the disk or a directory cannot be used
        ├── DiskFullError     for now: there is no room, nothing of the change was kept
        └── UnavailableError  for now: the same may be tried again without a change

A message says what was wrong, where, and what to do, in one line: programs print it and exit with
status 2, and never show a traceback for it.
"""

from __future__ import annotations

import reprlib
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from fedtt.messages import Problem

__all__ = [
    "BundleError",
    "ConfigError",
    "DataError",
    "Declined",
    "DiskFullError",
    "FedttError",
    "ForeignWork",
    "LayoutError",
    "Refused",
    "RuntimeFailure",
    "StorageError",
    "UnavailableError",
    "Unreachable",
    "WireError",
]


class _Shown(reprlib.Repr):
    """A value from outside in few words, however long, deep or large it is."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxstring, self.maxother = 4, 200, 200

    def repr_int(self, x: int, level: int) -> str:
        return repr(x) if x.bit_length() <= 64 else f"an integer of {x.bit_length()} bits"


_SHOWN = _Shown()


class FedttError(Exception):
    """Base of the tree; catch it to catch all that is not a bug."""


class ConfigError(FedttError):
    """A setting is nonsense: `field` names it, `value` is what was given, `allowed` what is."""

    def __init__(self, field: str, value: object, allowed: str, where: str = "") -> None:
        self.field, self.value, self.allowed, self.where = field, value, allowed, where
        prefix = f"{where}: " if where else ""
        super().__init__(f"{prefix}{field} = {_SHOWN.repr(value)} is not allowed: {allowed}")


class DataError(FedttError):
    """An examples file or one of its rows cannot be used."""


class LayoutError(FedttError):
    """A vector, factor or live set does not fit the layout it is used with."""


class BundleError(FedttError):
    """A bundle or a downloaded version is missing, damaged or of a format this program cannot read."""


class WireError(FedttError):
    """Bytes from outside are malformed, oversized, of another kind or not finite."""


class ForeignWork(WireError):
    """Work came under `lease` that this program does not know: a codec, a method, a field."""

    def __init__(self, lease: str, why: str) -> None:
        self.lease = lease
        super().__init__(f"{why}: is this program older than its server?")


class Refused(FedttError):
    """The peer understood the request and said no; `problem` is its typed answer.

    retry_after_s: seconds it asked to be left alone, where it said so.
    """

    def __init__(self, problem: Problem, retry_after_s: float | None = None) -> None:
        self.problem, self.retry_after_s = problem, retry_after_s
        remedy = f" ({problem.remedy})" if problem.remedy else ""
        super().__init__(f"{problem.code.value}: {problem.detail}{remedy}")


class Unreachable(FedttError):
    """The peer did not answer, or its answer broke off; the outcome of the request is unknown."""


class Declined(FedttError):
    """A device does not do the work: its owner's conditions forbid it, or a budget does, `of` which thing."""

    def __init__(
        self, why: str, of: Literal["conditions", "memory", "time", "traffic", "privacy"] = "conditions"
    ) -> None:
        self.of = of
        super().__init__(why)


class RuntimeFailure(FedttError):
    """The edge runtime could not load or run a graph."""


class StorageError(FedttError):
    """The database, the disk or a directory cannot be used."""


class DiskFullError(StorageError):
    """There is no room for a file; the one before is as it was, and the same may be tried again."""


class UnavailableError(StorageError):
    """What may do better soon: a database does not answer, whether or not it kept the last change, or a
    bundle's file cannot be read, which may be had again.
    """
