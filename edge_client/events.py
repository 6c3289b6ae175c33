"""What a device tells whoever watches it: one small value for each step it takes, and for each download."""

from __future__ import annotations

from collections.abc import Callable

from msgspec import Struct

from fedtt.messages import FailureCode, Receipt

__all__ = [
    "Acknowledged",
    "Downloaded",
    "Downloading",
    "Dropped",
    "Ended",
    "Enrolled",
    "Event",
    "GaveUp",
    "Granted",
    "Judged",
    "Observer",
    "Paused",
    "Redownloading",
    "Resting",
    "Retired",
    "Retrying",
    "Step",
    "Trained",
    "Waiting",
    "ignore",
]


class Event(Struct, frozen=True, kw_only=True, tag_field="event", tag=str.lower):
    """Base of all events."""


class Step(Event, frozen=True, kw_only=True):
    """The outcome of one step of a device's life."""

    pause_s: float = 0.0  #: to wait before the next


class Enrolled(Step, frozen=True, kw_only=True):
    """The server knows this device."""

    device: str


class Granted(Step, frozen=True, kw_only=True):
    """There is work."""

    lease: str
    task: str
    round: int
    version_number: int


class Waiting(Step, frozen=True, kw_only=True):
    """There is none now."""

    reason: str


class Resting(Step, frozen=True, kw_only=True):
    """The owner's conditions do not hold: nothing is asked for, or sent, until they do."""

    reason: str


class Trained(Step, frozen=True, kw_only=True):
    """A frame is stored, ready to be sent."""

    lease: str
    examples: int
    steps: int
    loss_first: float
    loss_last: float
    cut_texts: int  #: texts longer than the graph allows, trained on their beginning
    frame_bytes: int
    wall_s: float  #: of training, from the executor's start to its end
    depth: int | None = None  #: blocks that the step ran over a kept prefix; None for the whole step
    prefixes_computed: int = 0  #: rows whose prefix was computed
    prefixes_reused: int = 0  #: rows whose prefix was read from disk
    epsilon: float | None = None  #: of all private trainings for this task, this one with them


class Judged(Step, frozen=True, kw_only=True):
    """A version was judged on this device's examples, and the server has the verdict."""

    task: str
    version_number: int
    examples: int
    loss_before: float
    loss: float


class Acknowledged(Step, frozen=True, kw_only=True):
    """The server has the update on disk."""

    receipt: Receipt


class Dropped(Step, frozen=True, kw_only=True):
    """The server will never take this update, or the lease ended before it was trained."""

    lease: str
    reason: str


class GaveUp(Step, frozen=True, kw_only=True):
    """The lease could not be fulfilled; the server was told the code and nothing more."""

    lease: str
    code: FailureCode
    detail: str  #: stays on the device


class Retrying(Step, frozen=True, kw_only=True):
    """Something failed that may pass: nothing is lost, the same step comes again."""

    error: str


class Retired(Step, frozen=True, kw_only=True):
    """The server wants nothing more from this device."""

    reason: str


class Downloading(Event, frozen=True):
    """A bundle file begins to come."""

    file: str
    bytes: int
    offset: int  #: bytes that an earlier attempt left


class Redownloading(Event, frozen=True):
    """A cached file is damaged and will be had again."""

    file: str


class Downloaded(Event, frozen=True):
    """A bundle is complete and checked."""

    bundle: str
    bytes: int


class Paused(Event, frozen=True, kw_only=True):
    """The owner has asked the client to rest."""


class Ended(Event, frozen=True, kw_only=True):
    """The client ends; what it sent and received while it ran, in bytes of bodies."""

    sent_bytes: int
    received_bytes: int
    bundle_bytes: int  #: the part received that was bundle files


Observer = Callable[[Event], None]


def ignore(_: Event) -> None:
    """The observer that does not look."""
