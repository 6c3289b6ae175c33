"""Devices of a server under test: each sends one update a lease, repeats itself, and notes what it is told.

An update is a one at the device's own place and zero elsewhere, so that the factors themselves tell how
often each device was folded into each version (`benchmarks.faults.ledger`).
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Self

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from benchmarks.bundles import head_of
from edge_client.http_transport import HttpTransport
from edge_client.identity import Identity
from fedtt.codec import encode_delta
from fedtt.errors import FedttError, Refused, Unreachable
from fedtt.layout import LiveSet
from fedtt.messages import CheckIn, Code, Enroll, Plan, Receipt, Work
from fedtt.seams import SystemClock
from fedtt.wire import UpdateHeader, encode_update, layout_tag

__all__ = ["CHECK_IN", "Device", "Habits", "Notes", "devices", "frame_of"]

#: told in full each time: no request less to lose, and the server's work at its most
CHECK_IN = CheckIn(client="faults", runtimes=("onnxruntime",), examples=1)
_FINAL = {Code.STALE, Code.UNKNOWN_LEASE}


def frame_of(plan: Plan, numbers: int, place: int, *, examples: int = 1) -> bytes:
    """The update of the device that has this place among the numbers."""
    layout = head_of(numbers).layout
    live = LiveSet(layout, plan.live)
    delta = np.zeros(live.size, np.float32)
    delta[place] = 1.0
    header = UpdateHeader(
        layout=layout_tag(layout), examples=examples, steps=1, loss_first=1.0, loss_last=0.5
    )
    return encode_update(header, encode_delta(plan.codec, live, delta, np.random.default_rng(0)))


class Notes:
    """What the devices were told."""

    def __init__(self) -> None:
        self.acknowledged: dict[str, str] = {}  #: lease -> sha256 of the frame
        self.acknowledged_at: dict[str, float] = {}  #: lease -> Unix seconds
        self.counts: Counter[str] = Counter()
        self.wrong: list[str] = []  #: answers that no server may give
        self.latencies_s: list[float] = []  #: of uploads that were acknowledged, from their first sending
        self.check_in_latencies_s: list[float] = []  #: of check-ins that were answered, in the same way

    def receipt(self, lease: str, frame: bytes, receipt: Receipt) -> None:
        digest = hashlib.sha256(frame).hexdigest()
        if (receipt.lease, receipt.digest) != (lease, digest):
            self.wrong.append(f"a receipt for {receipt.digest} under {receipt.lease}, sent {digest}")
        self.acknowledged.setdefault(lease, digest)
        self.acknowledged_at.setdefault(lease, time.time())


class Habits:
    """How a device behaves: its pauses, and how often it repeats itself or lies."""

    def __init__(
        self,
        *,
        pause_s: float = 0.05,
        twice: float = 0.1,
        together: float = 0.05,
        other_bytes: float = 0.02,
        retry_s: float = 0.2,
    ) -> None:
        self.pause_s, self.twice, self.together = pause_s, twice, together
        self.other_bytes, self.retry_s = other_bytes, retry_s


class Device:
    """One key, one transport, and the frame of the lease in hand."""

    def __init__(self, number: int, url: str, numbers: int, notes: Notes, habits: Habits) -> None:
        self.number, self._numbers, self.notes, self._habits = number, numbers, notes, habits
        key = Ed25519PrivateKey.from_private_bytes((number + 1).to_bytes(32, "big"))
        self.identity = Identity(key)
        self.transport = self._connect(url)
        self._in_hand: tuple[str, bytes] | None = None  #: lease and frame without a final answer yet
        self._asked_at: float | None = None  #: when it first checked in without an answer yet
        self._rng = np.random.default_rng((1, number))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.transport.close()

    async def move(self, url: str) -> None:
        """Go to the server's new address."""
        await self.transport.close()
        self.transport = self._connect(url)

    def _connect(self, url: str) -> HttpTransport:
        return HttpTransport(url, self.identity, SystemClock(), timeout_s=20)

    async def enroll(self, token: str) -> None:
        """Until it is taken."""
        message = Enroll(public_key=self.identity.public_key, token=token, client="faults")
        while True:
            try:
                await self.transport.enroll(message)
                return
            except (Unreachable, Refused):
                await asyncio.sleep(self._habits.retry_s * self._rng.random())

    async def live(self, over: asyncio.Event) -> None:
        """Take part until it is over; a frame in hand is sent until it meets a final answer."""
        while not over.is_set():
            try:
                if self._in_hand is None:
                    await self._check_in()
                else:
                    await self._send(*self._in_hand, over)
            except Unreachable:
                self.notes.counts["unreachable"] += 1
                await self._pause(self._habits.retry_s)
            except Refused as error:
                self._refused(error)
                await self._pause(self._habits.retry_s)
            except FedttError as error:
                self.notes.wrong.append(str(error))

    async def _check_in(self) -> None:
        self._asked_at = self._asked_at or time.perf_counter()
        answer = await self.transport.check_in(CHECK_IN)
        self.notes.check_in_latencies_s.append(time.perf_counter() - self._asked_at)
        self._asked_at = None
        if isinstance(answer, Work):
            frame = frame_of(answer.plan, self._numbers, self.number % self._numbers)
            self._in_hand = answer.lease, frame
            await self._pause(self._habits.pause_s)
        else:
            await self._pause(max(self._habits.pause_s, self._habits.retry_s))

    async def _send(self, lease: str, frame: bytes, over: asyncio.Event) -> None:
        """The same bytes again and again, sometimes together with themselves, once more, or with others."""
        started = time.perf_counter()
        while not over.is_set():
            try:
                if self._rng.random() < self._habits.together:
                    both = [self.transport.upload(lease, frame) for _ in range(2)]
                    receipts: Sequence[Receipt] = await asyncio.gather(*both)
                else:
                    receipts = [await self.transport.upload(lease, frame)]
            except Unreachable:
                self.notes.counts["unreachable"] += 1
                await self._pause(self._habits.retry_s)
                continue
            except Refused as error:
                self._refused(error)
                if error.problem.code in _FINAL:
                    self._in_hand = None
                    return
                await self._pause(self._habits.retry_s)
                continue
            self.notes.latencies_s.append(time.perf_counter() - started)
            for receipt in receipts:
                self.notes.receipt(lease, frame, receipt)
            self._in_hand = None
            await self._repeat(lease, frame)
            return

    async def _repeat(self, lease: str, frame: bytes) -> None:
        if self._rng.random() < self._habits.twice:
            self.notes.counts["sent twice"] += 1
            self.notes.receipt(lease, frame, await self.transport.upload(lease, frame))
        if self._rng.random() < self._habits.other_bytes:
            self.notes.counts["sent other bytes"] += 1
            try:
                await self.transport.upload(lease, frame + b"\0")
                self.notes.wrong.append(f"other bytes were taken under {lease}")
            except Refused as error:
                if error.problem.code is not Code.CONFLICT:
                    self._refused(error)

    def _refused(self, error: Refused) -> None:
        self.notes.counts[f"refused {error.problem.code.value}"] += 1
        if error.problem.code is Code.INTERNAL:
            self.notes.wrong.append(str(error))

    async def _pause(self, mean_s: float) -> None:
        await asyncio.sleep(2 * mean_s * self._rng.random())


@asynccontextmanager
async def devices(
    count: int, url: str, numbers: int, habits: Habits | None = None
) -> AsyncIterator[tuple[list[Device], Notes]]:
    """So many devices that share their notes; their connections end with the block."""
    notes = Notes()
    found = [Device(number, url, numbers, notes, habits or Habits()) for number in range(count)]
    async with AsyncExitStack() as stack:
        for device in found:
            await stack.enter_async_context(device)
        yield found, notes
