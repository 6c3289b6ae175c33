"""What a device must remember through a crash, as one state that is replaced as a whole.

The lease in hand is in one of three phases. `Leased`: may be trained, and trained again after a crash.
`Trained`: the frame is fixed; only these bytes are ever sent under the lease. `Idle`: nothing in hand.
Error feedback follows the phase: `Trained` carries the next residual, which takes the old one's place in
the very write that records the receipt, and is dropped with the frame when the server refuses it.

In a home it is a file: b"fTTj", 32 bytes sha256 of the rest, then a msgpack map (see `State`).
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Annotated, Literal, Protocol

import msgspec
from msgspec import Meta, Struct
from msgspec.structs import replace

from edge_client.allowance import Pace
from edge_client.files import storage_errors, write_atomically
from edge_client.home import Home
from fedtt.errors import StorageError
from fedtt.messages import Receipt, Work

__all__ = [
    "Idle",
    "Journal",
    "Judging",
    "Leased",
    "Phase",
    "Place",
    "Residual",
    "State",
    "Trained",
    "is_journal",
    "read_state",
    "residual_key",
]

_MAGIC = b"fTTj"
_DIGEST_BYTES = 32
_RESIDUALS_KEPT = 8  #: each as large as the factors; a device takes part in few tasks at a time
_STILL_S = 300.0  #: after its end a round may still be given: by a server that was down or is slow
_TASKS_KEPT = 64  #: of which the newest round is remembered
_RESIDUAL_VERSIONS = 1000  #: after so many versions what was lost then says nothing about what is missing now


class Idle(Struct, frozen=True, tag="idle", forbid_unknown_fields=True):
    """No lease in hand."""


class Leased(Struct, frozen=True, kw_only=True, tag="leased", forbid_unknown_fields=True):
    """Work was granted and no frame exists yet."""

    work: Work
    expires_at: float  #: by the device's clock, Unix seconds
    attempts: Annotated[int, Meta(ge=0)] = 0  #: trainings begun and not ended: crashes, out of memory


class Judging(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A question that is being answered."""

    lease: str = ""  #: its name; "" for none
    attempts: Annotated[int, Meta(ge=0)] = 0  #: judgings begun and not ended: crashes, out of memory


class Residual(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What quantising an update lost, to be added to the next one of its task."""

    version_number: Annotated[int, Meta(ge=0)] = 0  #: of the version the update was trained on
    data: bytes = b""  #: (P,) float32, little-endian; b"" where the codec keeps none


class Trained(Struct, frozen=True, kw_only=True, tag="trained", forbid_unknown_fields=True):
    """The frame to send under a lease, until a receipt or a final refusal comes."""

    lease: str
    frame: bytes
    residual_key: str = ""  #: "" where the codec keeps no residual
    residual: Residual = Residual()  #: the next one


Phase = Idle | Leased | Trained


class State(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Everything in the journal."""

    format: Literal[1] = 1
    server: str = ""  #: address the device belongs to
    device: str = ""  #: its name, once the server may know it
    enrolled: bool = False  #: whether the server knows it now
    consented_at: float | None = None  #: when the owner said yes, Unix seconds
    clock_offset_s: float = 0.0  #: the server's clock less ours, where it matters
    phase: Phase = Idle()
    judging: Judging = Judging()
    finished_lease: str = ""  #: the last lease that came to an end: never to be trained again
    acknowledged: int = 0  #: updates the server has acknowledged
    receipt: Receipt | None = None  #: the last one
    residuals: dict[str, Residual] = {}  #: by `residual_key`, the longest unused first
    ca: str = ""  #: path of the certificates trusted for the server; "" for the machine's
    release_key: bytes = b""  #: trusted to sign bundles and to vouch for servers; b"" where none is
    newest_rounds: dict[str, int] = {}  #: by task: the latest that was begun, so that none goes back
    round_ends: dict[str, float] = {}  #: by task: when that one was to end, so that none stands still
    label_counts: dict[str, bytes] = {}  #: by sha256 of the labels: what was told of them, noise and all
    noise_secret: bytes = b""  #: of private trainings; b"" before the first
    privacy_spent: dict[str, float] = {}  #: by task: μ² of what was sent of it (`with_spent`)
    paces: dict[str, Pace] = {}  #: by `pace_key`, the longest unused first


def residual_key(task: str, layout_digest: str) -> str:
    """A residual belongs to one task and one meaning of theta."""
    return f"{task}:{layout_digest}"


class Place(Protocol):
    """Where a state outlives the program that keeps it."""

    def read(self) -> State | None:
        """The state that was written last; None before the first. Raises StorageError if it is damaged."""
        ...

    def write(self, state: State) -> None:
        """Return once the state will outlive a crash."""
        ...


class Journal:
    """The state of one home, of which the caller holds the lock, or of another place."""

    def __init__(self, place: Home | Place) -> None:
        self._place = _HomePlace(place) if isinstance(place, Home) else place
        known = self._place.read()
        self.state = known or State()  #: as it was written last
        if known is None:
            self._place.write(self.state)

    def update(self, **changes: object) -> None:
        """Change fields of the state; returns once they would outlive a crash.

        Where none is new nothing is written, so that a start needs no room.
        """
        state = replace(self.state, **changes)
        if state == self.state:
            return
        self._place.write(state)
        self.state = state

    def begin(self, task: str, round_number: int, ends_at: float | None, phase: Leased, now: float) -> str:
        """Take a lease in hand, unless a server that was set back or stands still gave it; why not, else "".

        ends_at: after which no server that lives gives a lease of this round, where it says so.
        """
        rounds, ends = dict(self.state.newest_rounds), dict(self.state.round_ends)
        newest, ended = rounds.pop(task, 0), ends.pop(task, None)
        if round_number < newest:
            return f"task {task!r} went back from round {newest} to {round_number}: is it an old server?"
        if round_number == newest and ended is not None:
            if now > ended + _STILL_S:
                still = f"stands still at round {newest}, over for {now - ended:.0f} s"
                return f"task {task!r} {still}: is it an old server?"
            ends_at = ended if ends_at is None else min(ended, ends_at)
        rounds[task] = round_number
        if ends_at is not None:
            ends[task] = ends_at
        kept = dict([*rounds.items()][-_TASKS_KEPT:])
        ends = {name: at for name, at in ends.items() if name in kept}
        self.update(phase=phase, newest_rounds=kept, round_ends=ends)
        return ""

    def commit(self, receipt: Receipt) -> None:
        """Close the trained lease with its receipt and let the next residual take its place, at once.

        An update the server discards leaves the old residual: what it carried was never folded.
        """
        phase = self.state.phase
        if not isinstance(phase, Trained):
            raise ValueError("only a trained lease can be committed")
        residuals = self.state.residuals
        if phase.residual_key and receipt.state.value != "discarded":
            older = {key: kept for key, kept in residuals.items() if key != phase.residual_key}
            newest = [*older.items(), (phase.residual_key, phase.residual)][-_RESIDUALS_KEPT:]
            residuals = dict(newest)
        self.update(
            phase=Idle(),
            finished_lease=phase.lease,
            acknowledged=self.state.acknowledged + 1,
            receipt=receipt,
            residuals=residuals,
        )

    def residual(self, key: str, version_number: int) -> bytes:
        """The residual to add to an update of that version; b"" where there is none.

        One made on a later version (a rollback, or a new task of the same name) or more than
        `_RESIDUAL_VERSIONS` ago is dropped for good.
        """
        found = self.state.residuals.get(key)
        if found is None:
            return b""
        if 0 <= version_number - found.version_number <= _RESIDUAL_VERSIONS:
            return found.data
        self.update(residuals={k: kept for k, kept in self.state.residuals.items() if k != key})
        return b""

    def drop(self, lease: str) -> None:
        """Forget the lease in hand, its frame and its next residual; the old residual stays."""
        self.update(phase=Idle(), finished_lease=lease)


class _HomePlace:
    """A file in a device's home."""

    def __init__(self, home: Home) -> None:
        self._home = home

    def read(self) -> State | None:
        home = self._home
        home.create()
        known = read_state(home)
        if known is None and home.key.exists():
            raise StorageError(
                f"{home.state} is missing beside the device's key: restore it, "
                f"or start anew with 'fedtt client forget --home {home.directory} --local-only'"
            )
        return known

    def write(self, state: State) -> None:
        body = msgspec.msgpack.encode(state)
        write_atomically(self._home.state, _MAGIC + hashlib.sha256(body).digest() + body)


def read_state(home: Home) -> State | None:
    """The state of a home, without its lock; None where there is none. Raises StorageError if damaged."""
    if not home.state.exists():
        return None
    with storage_errors(home.state):
        data = home.state.read_bytes()
    start = len(_MAGIC) + _DIGEST_BYTES
    digest, body = data[len(_MAGIC) : start], data[start:]
    if data[: len(_MAGIC)] != _MAGIC or hashlib.sha256(body).digest() != digest:
        raise _unreadable(home, "it is damaged")
    try:
        return msgspec.msgpack.decode(body, type=State)
    except msgspec.DecodeError as error:
        raise _unreadable(home, f"another release wrote it ({error})") from None


def is_journal(path: Path) -> bool:
    """Whether a file is a journal, be it damaged."""
    with storage_errors(path):
        if not path.is_file():
            return False
        with path.open("rb") as file:
            return file.read(len(_MAGIC)) == _MAGIC


def _unreadable(home: Home, why: str) -> StorageError:
    return StorageError(
        f"{home.state} cannot be read, {why}: restore it from a copy, "
        f"or start anew with 'fedtt client forget --home {home.directory} --local-only'"
    )
