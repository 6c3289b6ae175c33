"""What the admin listener's JSON answers hold, as types."""

from __future__ import annotations

from typing import Any, TypeVar

from msgspec import Struct, defstruct
from msgspec.structs import fields

from fedtt.messages import Problem
from fedtt.task import TaskSpec
from storage.records import (
    AdminToken,
    Audit,
    Device,
    DeviceState,
    Group,
    Round,
    RoundState,
    TaskState,
    UpdateState,
    Version,
)

__all__ = [
    "ActivityRow",
    "AdminTokenRow",
    "AuditRow",
    "DeviceRow",
    "GroupRow",
    "NewAdminToken",
    "NewToken",
    "Population",
    "Refusal",
    "RevokedDevice",
    "RevokedToken",
    "RoundRow",
    "Seen",
    "SentBlob",
    "SentBundle",
    "TaskDetail",
    "TaskRow",
    "VersionRow",
    "as_row",
]


R = TypeVar("R", bound=Struct)


class Row(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of all answers."""


def _row_of(name: str, record: type[Struct], about: str, *, hidden: set[str] = set(), **more: Any) -> Any:  # noqa: B006
    """A row of the store as people see it: without some of its fields, and with others."""
    kept = {field.name: field.type for field in fields(record) if field.name not in hidden}
    made = defstruct(name, list((kept | more).items()), bases=(Row,), frozen=True, kw_only=True)
    made.__doc__ = about
    return made


def as_row(kind: type[R], record: Struct, **more: object) -> R:
    """A record as the row of `kind`, with what `more` adds or says otherwise."""
    kept = {field.name for field in fields(kind)} - more.keys()
    return kind(**{name: getattr(record, name) for name in kept}, **more)


class Refusal(Row, frozen=True):
    """A refused call: nothing was changed by it."""

    error: Problem


class TaskRow(Row, frozen=True):
    """One task and how far it has come."""

    name: str
    state: TaskState
    reason: str  #: why it is in this state
    version: int | None  #: number of the newest
    of: int  #: rounds that it is to fold
    round: int  #: number of the newest; 0 before the first
    round_state: RoundState | None
    updates_in_round: int  #: that wait to be folded
    loss: float | None
    bundle: str
    created_at: float


GroupRow = _row_of("GroupRow", Group, "A group of devices between two global folds.", devices=int)
TaskDetail = _row_of(
    "TaskDetail",
    TaskRow,
    "One task with its settings and the groups that its devices train in now.",
    spec=TaskSpec,
    groups=list[GroupRow],  # type: ignore[valid-type]  # made above
)
RoundRow = _row_of(
    "RoundRow",
    Round,
    "One attempt to make the next version, and what became of its updates.",
    invited=int,
    updates=dict[UpdateState, int],
)
VersionRow = _row_of("VersionRow", Version, "One bit-identical set of factors.")
DeviceRow = _row_of("DeviceRow", Device, "One member of the population.", hidden={"public_key", "last_nonce"})
AuditRow = _row_of("AuditRow", Audit, "One change that a person made, chained to the one before it.")
AdminTokenRow = _row_of(
    "AdminTokenRow", AdminToken, "A person's right to the admin listener.", hidden={"sha256"}
)
NewAdminToken = _row_of(
    "NewAdminToken", AdminToken, "A token, shown this once.", hidden={"sha256"}, token=str
)


class NewToken(Row, frozen=True):
    """An enrolment token, shown this once."""

    token: str
    sha256: str  #: by which it is revoked
    uses: int | None
    expires_at: float | None


class RevokedToken(Row, frozen=True):
    """An enrolment token that enrols nobody any more."""

    sha256: str


class RevokedDevice(Row, frozen=True):
    """A device whose key was taken out for good."""

    id: str
    state: DeviceState
    revoked_at: float | None


class SentBlob(Row, frozen=True):
    """One file is stored."""

    sha256: str


class SentBundle(Row, frozen=True):
    """A bundle is registered."""

    bundle: str  #: sha256 of its manifest


class Seen(Row, frozen=True):
    """Active devices seen lately."""

    within_s: int
    devices: int


class Population(Row, frozen=True):
    """How many devices there are."""

    devices: dict[DeviceState, int]
    seen: list[Seen]


class ActivityRow(Row, frozen=True):
    """What this process has done since it started."""

    now: float
    since: float
    requests: dict[str, int]  #: by listener
    received_bytes: dict[str, int]
    sent_bytes: dict[str, int]
    updates: dict[str, int]  #: by state
    check_ins: dict[str, int]  #: by answer
    refusals: dict[str, int]  #: by code
