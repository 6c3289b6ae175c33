"""The protocol: small immutable messages in closed unions, msgpack on the wire (docs/protocol.md).

Each message is a map whose `type` names it; unknown fields and unknown types are refused with an error
that names them. Binary parts (updates, versions, bundle files) travel as bodies of their own.
"""

from __future__ import annotations

import hashlib
from enum import Enum, StrEnum
from functools import lru_cache
from typing import Annotated, Literal, TypeVar, cast

import msgspec
from msgspec import Meta, Struct

from fedtt.algorithms import Method
from fedtt.budget import Budget
from fedtt.codec import CodecSpec
from fedtt.errors import ConfigError, ForeignWork, WireError
from fedtt.names import DeviceId, LeaseId, Name, Sha256
from fedtt.optimiser import TrainingSpec
from fedtt.privacy import PrivacySpec
from fedtt.signature import LATEST_S

__all__ = [
    "DIFFERENCE_MEDIA_TYPE",
    "MEDIA_TYPE",
    "MESSAGE_LIMIT_BYTES",
    "STATUS",
    "AsTold",
    "CheckIn",
    "CheckInAnswer",
    "Code",
    "Enroll",
    "Enrolled",
    "Failure",
    "FailureCode",
    "Judge",
    "Judged",
    "Message",
    "Plan",
    "Problem",
    "Receipt",
    "Retired",
    "Tell",
    "UpdateState",
    "Verdict",
    "Wait",
    "Work",
    "decode",
    "decode_answer",
    "decode_check_in",
    "device_id",
    "encode",
]

MEDIA_TYPE = "application/vnd.fedtt+msgpack"
DIFFERENCE_MEDIA_TYPE = "application/vnd.fedtt.difference"  #: of a version that came as its difference
MESSAGE_LIMIT_BYTES = 16 * 1024  #: no message is longer; bodies are cut off before they are read

Text = Annotated[str, Meta(max_length=500)]
Count = Annotated[int, Meta(ge=0, le=2**53)]
Told = Annotated[bytes, Meta(min_length=4, max_length=4)]
Seconds = Annotated[float, Meta(ge=0, le=10**9)]
UnixSeconds = Annotated[float, Meta(ge=0, le=LATEST_S)]  #: no NaN either


class Message(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="type", tag=str.lower):
    """Base of all messages; the tag is the class's name in lower case."""


class Enroll(Message, frozen=True):
    """A device's own key and the token its owner was given."""

    public_key: Annotated[bytes, Meta(min_length=32, max_length=32)]  #: Ed25519
    token: Annotated[str, Meta(max_length=200)]
    client: Name  #: program and version, for people who look at the device list


class Enrolled(Message, frozen=True):
    """The name under which the server knows the key."""

    device: DeviceId
    release_key: Annotated[bytes, Meta(min_length=32, max_length=32)] | None = (
        None  #: that signs this server's bundles and vouches for its answers, where there is one
    )


class CheckIn(Message, frozen=True):
    """What I have and can do."""

    client: Name
    runtimes: Annotated[tuple[Name, ...], Meta(max_length=8)]
    examples: Count  #: usable examples on the device
    memory_mb: Count = 0  #: training may use; 0 where the device does not say
    judges: bool = False  #: whether it may be asked to judge versions, too

    def as_told(self) -> AsTold:
        """The short form of the same."""
        return _as_told(self.client, self.runtimes, self.examples, self.memory_mb, self.judges)


class AsTold(Message, frozen=True):
    """What I have and can do is what I told you last: a check-in of 26 bytes."""

    digest: Told  #: the first of sha256 over the fields of `CheckIn` in their order, as a msgpack array


@lru_cache(maxsize=256)  # a device says the same each time, and many devices do
def _as_told(*facts: object) -> AsTold:
    return AsTold(digest=hashlib.sha256(msgspec.msgpack.encode(facts)).digest()[:4])


class Plan(Message, frozen=True):
    """Everything a device needs to know to train one update."""

    task: Name
    seed: int
    bundle: Sha256
    version: Sha256  #: of the factors to start from
    version_number: Count
    round: Count
    live: Annotated[tuple[Count, ...], Meta(min_length=1, max_length=65536)]  #: indices into the layout
    training: TrainingSpec
    codec: CodecSpec
    method: Method
    min_examples: Count
    rank: Annotated[int, Meta(ge=1, le=4096)] | None = None  #: of the variant; None for the adapter's own
    label_epsilon: Annotated[float, Meta(gt=0, le=100)] | None = (
        None  #: of the label counts asked for, if any
    )
    budget: Budget = Budget()  #: the most it may take of the device
    privacy: PrivacySpec | None = None  #: noise for the device to add; None for none


class Work(Message, frozen=True):
    """Train by this plan and upload under this lease."""

    lease: LeaseId
    expires_in_s: Seconds
    plan: Plan
    round_ends_in_s: Seconds | None = None  #: no lease of this round is given after that


class Judge(Message, frozen=True):
    """Judge a version beside the one before it on your own examples; the verdict goes under this lease."""

    lease: LeaseId
    expires_in_s: Seconds
    task: Name
    seed: int
    bundle: Sha256
    version: Sha256
    version_number: Count
    before: Sha256  #: the version that stood before it
    examples: Annotated[int, Meta(ge=1, le=10**9)]  #: of the device's own, at most


class Judged(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What one version came to on some examples."""

    loss: Annotated[float, Meta(ge=0, le=1e9)]  #: mean over examples, or over predicted tokens, in nats
    right: Count | None = None  #: examples with the right label; None for language modelling


class Verdict(Message, frozen=True):
    """A version beside the one before it, on the same examples."""

    examples: Annotated[int, Meta(ge=1, le=2**53)]
    before: Judged
    after: Judged

    def __post_init__(self) -> None:
        for name, judged in (("before", self.before), ("after", self.after)):
            if judged.right is not None and judged.right > self.examples:
                raise ConfigError(f"{name}.right", judged.right, f"at most examples = {self.examples}")


class Wait(Message, frozen=True):
    """Nothing to do now; come back later."""

    retry_after_s: Seconds
    reason: Text = ""


class Retired(Message, frozen=True):
    """This device is no longer part of the population."""

    reason: Text = ""


class Tell(Message, frozen=True):
    """What you have and can do is not what I keep of you: check in in full. Nothing was changed."""


CheckInAnswer = Work | Judge | Wait | Retired | Tell


class FailureCode(Enum):
    """Why a device gave a lease back."""

    NO_EXAMPLES = "no_examples"  #: too few usable examples
    BUNDLE = "bundle"  #: the bundle could not be had or read
    RUNTIME = "runtime"  #: the graph did not load or run
    NOT_FINITE = "not_finite"  #: training diverged
    CONDITIONS = "conditions"  #: battery, network or owner said no
    MEMORY = "memory"  #: it has less than the plan may use
    TIME = "time"  #: training takes longer than the plan or the owner allows
    TRAFFIC = "traffic"  #: so does what would be downloaded or sent
    PRIVACY = "privacy"  #: one training more would say too much of its examples
    OTHER = "other"


class Failure(Message, frozen=True):
    """I hold this lease and cannot fulfil it."""

    code: FailureCode
    detail: Text = ""


class UpdateState(StrEnum):
    """Where an acknowledged update stands; all but ACCEPTED are terminal."""

    ACCEPTED = "accepted"  #: durable, not yet folded
    FOLDED = "folded"  #: part of exactly one version
    DISCARDED = "discarded"  #: will never be folded, for the reason given


class Receipt(Message, frozen=True):
    """The server has this update on disk, and this has become of it."""

    lease: LeaseId
    digest: Sha256  #: of the frame's bytes
    state: UpdateState
    reason: Text = ""
    version_number: Count | None = None  #: the version it was folded into


class Code(Enum):
    """Why a request was refused; each has one HTTP status (see `STATUS`)."""

    MALFORMED = "malformed"  #: not the bytes the protocol allows
    WRONG_LAYOUT = "wrong_layout"  #: an update for another factor layout or codec
    NOT_FINITE = "not_finite"  #: NaN or infinity among the factors
    BAD_TOKEN = "bad_token"  # noqa: S105  #: unknown, used-up or expired enrolment token
    BAD_SIGNATURE = "bad_signature"  #: missing or wrong request signature
    UNKNOWN_DEVICE = "unknown_device"  #: signed by a key that is not enrolled here; enrol again
    CLOCK_SKEW = "clock_skew"  #: signed too long ago or in the future; `now` carries the server's time
    REPLAYED = "replayed"  #: signed with a nonce that is not above an earlier one
    REVOKED = "revoked"  #: an operator took this device's key out for good
    FORBIDDEN = "forbidden"  #: the admin token is missing or wrong
    NOT_FOUND = "not_found"
    UNKNOWN_LEASE = "unknown_lease"  #: never given, or given to another device
    CONFLICT = "conflict"  #: the same lease with other bytes, or the same name again
    STALE = "stale"  #: the round has closed or the base version is too old
    TOO_LARGE = "too_large"
    TOO_MANY = "too_many"  #: more requests than one device or one range of addresses may send
    BUSY = "busy"  #: come back after the time in Retry-After
    INTERNAL = "internal"  #: a bug; the request changed nothing


STATUS: dict[Code, int] = {
    Code.MALFORMED: 400,
    Code.WRONG_LAYOUT: 422,
    Code.NOT_FINITE: 422,
    Code.BAD_TOKEN: 403,
    Code.BAD_SIGNATURE: 401,
    Code.UNKNOWN_DEVICE: 401,
    Code.CLOCK_SKEW: 401,
    Code.REPLAYED: 401,
    Code.REVOKED: 403,
    Code.FORBIDDEN: 403,
    Code.NOT_FOUND: 404,
    Code.UNKNOWN_LEASE: 404,
    Code.CONFLICT: 409,
    Code.STALE: 410,
    Code.TOO_LARGE: 413,
    Code.TOO_MANY: 429,
    Code.BUSY: 503,
    Code.INTERNAL: 500,
}


class Problem(Message, frozen=True):
    """A refusal: nothing was changed by the request."""

    code: Code
    detail: Text
    remedy: Text = ""
    now: UnixSeconds | None = None  #: the server's time in Unix seconds, where it helps


M = TypeVar("M")


class _Tag(Struct, frozen=True):
    type: str = ""


class _UnderLease(Struct, frozen=True):
    """What all work has, of whichever release."""

    type: Literal["work", "judge"]
    lease: LeaseId


#: msgspec (0.22) crashes where two threads make it learn a type at once, so it learns them all here.
_LEARNT = [msgspec.msgpack.Decoder(kind) for kind in (*Message.__subclasses__(), _Tag, _UnderLease)]


def encode(message: Message) -> bytes:
    return msgspec.msgpack.encode(message)


def decode(data: bytes, kind: type[M]) -> M:
    """Read one message of a type, or of a union of types; raises WireError that names the field.

    It takes at most 24 times the message's bytes of memory, and 16 KiB.
    """
    if len(data) > MESSAGE_LIMIT_BYTES:
        raise WireError(f"a message has {len(data)} bytes, at most {MESSAGE_LIMIT_BYTES} are read")
    try:
        return msgspec.msgpack.decode(data, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, ConfigError) as error:
        raise WireError(f"not a valid message: {error}") from None


def decode_check_in(data: bytes) -> CheckIn | AsTold:
    """Either form of a check-in; one without its type is the full one. Raises WireError as `decode` does."""
    if decode(data, _Tag).type == "astold":
        return decode(data, AsTold)
    return decode(data, CheckIn)


def decode_answer(data: bytes) -> CheckInAnswer:
    """What a check-in brings. Raises WireError as `decode` does, ForeignWork where its lease can be read."""
    try:
        return decode(data, cast("type[CheckInAnswer]", CheckInAnswer))
    except WireError as error:
        try:
            lease = decode(data, _UnderLease).lease
        except WireError:
            raise error from None
        raise ForeignWork(lease, str(error)) from None


@lru_cache(maxsize=1)
def device_id(public_key: bytes) -> str:
    """A device's name: the first 128 bits of sha256 over its public key, in hex; kept for the newest."""
    return hashlib.sha256(public_key).hexdigest()[:32]
