"""The server without its sockets: what each call does, for HTTP routes and in-process transports alike."""

from __future__ import annotations

import asyncio
import logging
import re
import secrets
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from aggregator.coordinator import Coordinator
from aggregator.differences import Differences
from aggregator.folding import server_state
from aggregator.inline import Aside, InlineTogether, InlineWriter, at_once
from aggregator.keeper import Keeper
from aggregator.metrics import Metrics
from aggregator.pace import Pace
from aggregator.problems import bad_signature, busy, malformed, not_found, unknown_lease
from aggregator.releases import Releases
from aggregator.threads import Threads
from aggregator.together import Answers, Together
from aggregator.token_files import token_sha256
from aggregator.tracing import UNTRACED, Tracer
from aggregator.update_check import check_update, check_updates
from aggregator.uploads import Admission, Upload
from aggregator.writer import QUEUE_LIMIT, QueueFullError, Writer
from fedtt.codec import payload_bytes
from fedtt.messages import (
    AsTold,
    CheckIn,
    CheckInAnswer,
    Enroll,
    Enrolled,
    Failure,
    Problem,
    Receipt,
    Verdict,
    Wait,
)
from fedtt.seams import Clock, VersionBody
from fedtt.wire import update_digest, update_limit_bytes, zeros_digest
from storage.blobs import BlobStore, load
from storage.records import Device
from storage.store import Store, Transaction

if TYPE_CHECKING:
    from aggregator.server_key import ServerKey  # its library is not needed in process

__all__ = ["Proof", "Service"]

T = TypeVar("T")
Admitted = tuple[Admission, int]  #: and the most bytes its frame may have
Proof = Callable[[Device | None], Problem | None]  #: what is wrong with who claims to send a request
_log = logging.getLogger("fedtt.aggregator")
_SHA256 = re.compile("[0-9a-f]{64}")
_BLOB_THREADS = 8


class _Knock(NamedTuple):
    """Who asks, and for which upload, if any."""

    device: str
    proof: Proof = lambda device: None
    lease: str = ""
    digest: str = ""


class _Known(NamedTuple):
    """What there is to say to a knock."""

    device: Device | None
    problem: Problem | None  #: that its proof found
    admitted: Admitted | Receipt | Problem


class _Sent(NamedTuple):
    """An admitted update's bytes, and what their digest is said to be."""

    admission: Admission
    frame: bytes
    digest: str


class Service:
    """One aggregator process over a store; everything it knows lies in the store and the blobs.

    inline: do all work on the caller's thread, one change a commit, as an emulator's own server does; such
    a service awaits nothing but its clock. queue_limit: most requests that wait for a commit otherwise.
    """

    def __init__(
        self,
        store: Store,
        blobs: BlobStore,
        clock: Clock,
        *,
        inline: bool = False,
        queue_limit: int = QUEUE_LIMIT,
        tracer: Tracer = UNTRACED,
    ) -> None:
        self.store, self.blobs, self.clock, self.tracer = store, blobs, clock, tracer
        self.lifecycle = Releases(lambda version: server_state(blobs, version))
        self.coordinator = Coordinator(self.lifecycle)
        self.metrics = Metrics()
        self.started_at = clock.now()
        self.pace = Pace()
        self.new_draw_key: Callable[[], str] = partial(secrets.token_hex, 16)  #: of each task
        self.draining = False  #: about to stop: no longer ready for new devices
        self.server_key: ServerKey | None = None  #: signs answers to check-ins, where there is one
        self.aside: Aside = at_once if inline else asyncio.to_thread
        self._threads = Threads("fedtt-blobs", _BLOB_THREADS)
        self.beside_blobs: Aside = at_once if inline else self._threads  #: what waits for files or objects
        self.writer: Writer | InlineWriter = (
            InlineWriter(store)
            if inline
            else Writer(
                store,
                queue_limit=queue_limit,
                observe=self.metrics.committed,
                refused=self.metrics.no_room,
            )
        )
        self.metrics.watch_queue(lambda: self.writer.waiting())
        together = InlineTogether if inline else Together
        self._door: Answers[_Knock, _Known] = together(self._look)
        self._inspection: Answers[_Sent, Upload | Problem] = together(_inspect)
        self._differences = Differences(blobs, aside=self.beside_blobs)
        self.keeper = Keeper(
            store,
            blobs,
            clock,
            self.lifecycle,
            self.writer,
            aside=self.aside,
            tracer=tracer,
            metrics=self.metrics,
        )

    async def write(self, change: Callable[[Transaction], T], *, task: str = "") -> T | Problem:
        """Run a change in the next commit; a full queue is a typed refusal. task: whose share it takes."""
        try:
            return await self.writer.request(change, task=task)
        except QueueFullError as error:
            return busy(str(error))

    async def read(self, look: Callable[[Transaction], T]) -> T:
        """Look at one consistent state, off the event loop."""

        def reading() -> T:
            with self.store.reading() as tx:
                return look(tx)

        return await self.aside(reading)

    # devices

    # a nonce is that of the request's signature; None where a caller in this process needs none

    async def enroll(self, message: Enroll, nonce: int | None = None) -> Enrolled | Problem:
        sha256 = token_sha256(message.token)
        answer = await self.write(
            lambda tx: self.coordinator.enroll(tx, self.clock.now(), message, sha256, nonce)
        )
        if isinstance(answer, Enrolled) and self.server_key is not None:
            return Enrolled(device=answer.device, release_key=self.server_key.release_key)
        return answer

    async def device(self, device_name: str) -> Device | None:
        return (await self._door.ask(_Knock(device_name))).device

    async def sender(self, device_name: str, proof: Proof) -> Problem | None:
        """What is wrong with whoever says to be this device."""
        return (await self._door.ask(_Knock(device_name, proof))).problem

    async def check_in(
        self, device_name: str, message: CheckIn | AsTold, nonce: int | None = None
    ) -> CheckInAnswer | Problem:
        answer = await self.write(
            lambda tx: self.coordinator.check_in(tx, self.clock.now(), device_name, message, nonce)
        )
        if not isinstance(answer, Problem):
            self.metrics.checked_in(answer)
        if isinstance(answer, Wait):
            self.pace.told(answer.retry_after_s)
        return answer

    async def admit(
        self, device_name: str, lease: str, digest: str, proof: Proof = lambda device: None
    ) -> tuple[Problem | None, Admitted | Receipt | Problem]:
        """Before the body is read: what is wrong with whoever says to be this device; then whether an update
        may come from it, and the most bytes it may have.
        """
        known = await self._door.ask(_Knock(device_name, proof, lease, digest))
        return known.problem, known.admitted

    def _look(self, knocks: Sequence[_Knock]) -> list[_Known]:
        """Answer all from one look at the store; signatures, which take longest, are checked after it."""
        leases = [knock.lease for knock in knocks if knock.lease]
        with self.store.reading() as tx, tx.together(leases, [knock.device for knock in knocks]):
            found = [(tx.device(knock.device), self._admitted(tx, knock)) for knock in knocks]
        return [
            _Known(device, knock.proof(device), admitted)
            for knock, (device, admitted) in zip(knocks, found, strict=True)
        ]

    def _admitted(self, tx: Transaction, knock: _Knock) -> Admitted | Receipt | Problem:
        if not knock.lease:
            return unknown_lease(knock.lease)
        admission = self.coordinator.admit(tx, knock.device, knock.lease, knock.digest)
        if not isinstance(admission, Admission):
            return admission
        wanted = admission.wanted
        return admission, update_limit_bytes(payload_bytes(wanted.codec, wanted.live_set), wanted.labels)

    async def upload(self, admission: Admission, frame: bytes, digest: str) -> Receipt | Problem:
        """Check an admitted update and acknowledge it once it is durable.

        digest: sha256 in hex that whoever sent the frame has signed.
        """
        upload = await self._inspection.ask(_Sent(admission, frame, digest))
        if isinstance(upload, Problem):
            return upload
        try:
            task = admission.task.spec.name
            answer = await self.writer.request_together(self._accept_all, upload, task=task)
        except QueueFullError as error:
            return busy(str(error))
        self.keeper.wake()
        return answer

    async def take(self, device_name: str, lease: str, frame: bytes) -> Receipt | Problem:
        """Admit, check and acknowledge in one change, for a caller who has the whole frame already.

        Nobody else's change goes on meanwhile: over HTTP, updates are checked outside the writer.
        """
        digest = update_digest(frame)

        def change(tx: Transaction) -> Receipt | Problem:
            admission = self.coordinator.admit(tx, device_name, lease, digest)
            if not isinstance(admission, Admission):
                return admission
            checked = check_update(frame, admission.wanted)
            if isinstance(checked, Problem):
                return checked
            header, payload = checked
            upload = Upload(admission=admission, digest=digest, header=header, payload=payload)
            return self.coordinator.append(tx, self.clock.now(), upload)

        return await self.write(change)

    def _accept_all(self, tx: Transaction, uploads: Sequence[Upload]) -> list[Receipt | Problem]:
        return self.coordinator.accept_all(tx, self.clock.now(), uploads)

    async def receipt(self, device_name: str, lease: str) -> Receipt | Problem:
        return await self.read(lambda tx: self.coordinator.receipt(tx, device_name, lease))

    async def judge(self, device_name: str, lease: str, verdict: Verdict) -> Problem | None:
        """Take a device's verdict on a candidate."""
        now, take = self.clock.now(), self.coordinator.evaluations.accept
        answer = await self.write(lambda tx: take(tx, now, device_name, lease, verdict))
        self.keeper.wake()
        return answer

    async def fail(self, device_name: str, lease: str, failure: Failure) -> Problem | None:
        _log.info(
            "device %s gave lease %s back: %s %r", device_name, lease, failure.code.value, failure.detail
        )
        refused = await self.write(lambda tx: self.coordinator.fail(tx, device_name, lease))
        if refused is None:
            self.metrics.gave_back(failure.code)
        return refused

    async def leave(self, device_name: str, *, erase: bool, nonce: int | None = None) -> Problem | None:
        return await self.write(lambda tx: self.coordinator.leave(tx, device_name, erase=erase, nonce=nonce))

    async def version(self, sha256: str, held: str | None = None) -> VersionBody | Problem:
        """A version, as its difference from the one the device holds where that is known here and shorter."""
        difference = await self.difference(sha256, held)
        if isinstance(difference, Problem):
            return difference
        if difference is not None:
            return VersionBody(data=difference, difference=True)
        return VersionBody(data=await self.beside_blobs(load, self.blobs, sha256))

    async def difference(self, sha256: str, held: str | None = None) -> bytes | Problem | None:
        """The difference alone; None where the whole version is to be sent."""
        if held is not None and not _SHA256.fullmatch(held):
            return malformed(f"from={held[:80]!r} names no version: a name is a sha256 in 64 hex digits")
        if not await self.read(lambda tx: tx.has_version(sha256)):
            return not_found(f"version {sha256[:12]}…")
        if held is None or not await self._holds(held, sha256):
            return None
        return await self._differences.between(held, sha256)

    async def _holds(self, held: str, sha256: str) -> bool:
        """Whether a device holds what is known here: a version, or zeros as long as the one it wants."""
        if await self.read(lambda tx: tx.has_version(held)):
            return True
        return held == zeros_digest(await self.beside_blobs(self.blobs.size, sha256))

    async def tick(self) -> None:
        """Move all rounds on that are due."""
        await self.keeper.tick()

    def close(self) -> None:
        """Once nobody asks any more and its writer has stopped."""
        self._threads.close()


def _inspect(sent: Sequence[_Sent]) -> list[Upload | Problem]:
    """Each update with its content, or what is wrong with it."""
    found: list[Upload | Problem] = []
    checked = check_updates([(one.frame, one.admission.wanted) for one in sent])
    for one, update in zip(sent, checked, strict=True):
        if update_digest(one.frame) != one.digest:
            found.append(bad_signature("Content-Digest does not match the body"))
        elif isinstance(update, Problem):
            found.append(update)
        else:
            header, payload = update
            found.append(Upload(admission=one.admission, digest=one.digest, header=header, payload=payload))
    return found
