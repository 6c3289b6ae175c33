"""What came of each piece of work that a device was given."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from edge_client import events
from fedtt.seams import Clock

__all__ = ["COLUMNS", "Participation", "Participations", "Row", "Traffic"]

Row = tuple[object, ...]

#: Of one row: times in seconds of the run, bytes of the update's frame, losses of the first and last step.
COLUMNS = (
    "device",
    "round",
    "version",
    "granted_s",
    "ended_s",
    "outcome",
    "steps",
    "examples",
    "loss_first",
    "loss_last",
    "frame_bytes",
)


@dataclass
class Traffic:
    """Check-ins, and bytes of bodies, of all devices together."""

    check_ins: int = 0
    sent_bytes: int = 0
    received_bytes: int = 0  #: without bundles
    bundle_bytes: int = 0


class Participations:
    """Counts of all devices; `write` is handed a row for each piece of work that has come to its end."""

    def __init__(self, start_s: float = 0.0, write: Callable[[Row], None] | None = None) -> None:
        """start_s: when the run began, Unix seconds."""
        self.start_s, self.write = start_s, write
        self.traffic = Traffic()
        self.outcomes: Counter[str] = Counter()
        self.trained = 0  #: trainings that came to an update
        self.steps = 0  #: local steps of all trainings
        self.frame_bytes = 0
        self._in_hand: dict[int, Participation] = {}

    def of(self, index: int, clock: Clock) -> Participation:
        """What a device has in hand, else an empty one; `clock` is its own."""
        found = self._in_hand.pop(index, None) or Participation(self, index)
        found.clock = clock
        return found

    def keep(self, participation: Participation) -> None:
        """Until its device comes again."""
        self._in_hand[participation.device] = participation


class Participation:
    """One device's work in hand, from the lease to its end."""

    __slots__ = ("_books", "_granted_at", "_lease", "_trained", "clock", "device")
    clock: Clock

    def __init__(self, books: Participations, device: int) -> None:
        self._books, self.device = books, device
        self._lease: events.Granted | None = None
        self._trained: events.Trained | None = None
        self._granted_at = 0.0

    def observe(self, event: events.Event) -> None:
        if type(event) is events.Granted:
            self._lease, self._trained, self._granted_at = event, None, self.clock.now()
        elif type(event) is events.Trained:
            self._trained = event
            self._books.trained += 1
            self._books.steps += event.steps
            self._books.frame_bytes += event.frame_bytes
        elif type(event) is events.Acknowledged:
            self.ended("acknowledged")
        elif type(event) is events.Dropped:
            self.ended("dropped")
        elif type(event) is events.GaveUp:
            self.ended(f"gave up: {event.code.value}")

    def asleep(self) -> None:
        """The device is gone for now, perhaps with work in hand."""
        if self._lease is not None:
            self._books.keep(self)

    def crashed(self) -> None:
        """The device vanished; it goes on with the same work when it is back."""
        self._books.outcomes["vanished"] += 1

    def ended(self, outcome: str) -> None:
        self._books.outcomes[outcome] += 1
        if self._books.write is not None:
            self._books.write(self._row(outcome))
        self._lease = self._trained = None

    def _row(self, outcome: str) -> Row:
        lease, trained, start_s = self._lease, self._trained, self._books.start_s
        return (
            self.device,
            lease.round if lease else None,
            lease.version_number if lease else None,
            round(self._granted_at - start_s, 3),
            round(self.clock.now() - start_s, 3),
            outcome,
            trained.steps if trained else 0,
            trained.examples if trained else 0,
            trained.loss_first if trained else None,
            trained.loss_last if trained else None,
            trained.frame_bytes if trained else 0,
        )
