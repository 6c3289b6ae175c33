"""What goes wrong between a device and its server, as a transport round another one."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Coroutine
from typing import Any, NoReturn, TypeVar

from msgspec import Struct
from msgspec.structs import replace

from fedtt.errors import ConfigError, Unreachable
from fedtt.messages import AsTold, CheckIn, CheckInAnswer, Enroll, Enrolled, Failure, Receipt, Verdict
from fedtt.rng import Purpose, rng_for
from fedtt.seams import Clock, Transport, VersionBody

__all__ = ["FaultSpec", "Faulty"]

T = TypeVar("T")
_KINDS = ("lost_request", "lost_answer", "duplicate", "corrupt", "delay")


class FaultSpec(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Probabilities of one exchange, each by itself."""

    lost_request: float = 0.0  #: the server never hears of it
    lost_answer: float = 0.0  #: the server has done it, the device does not know
    duplicate: float = 0.0  #: an update arrives twice
    corrupt: float = 0.0  #: one byte of an update, or of a version on its way down, is another one
    delay: float = 0.0  #: it takes `delay_s` longer
    delay_s: float = 10.0
    timeout_s: float = 30.0  #: after which a device gives up on an answer

    def __post_init__(self) -> None:
        for field in _KINDS:
            if not 0 <= getattr(self, field) < 1:
                raise ConfigError(f"faults.{field}", getattr(self, field), "a probability from 0, below 1")
        for field in ("delay_s", "timeout_s"):
            if not 0 < getattr(self, field) < float("inf"):
                raise ConfigError(f"faults.{field}", getattr(self, field), "seconds above 0")


class _Fate(Struct, frozen=True, kw_only=True):
    """What befalls one exchange."""

    lost_request: bool
    lost_answer: bool
    duplicate: bool
    corrupt: bool
    delay: bool
    place: float  #: of the corrupted byte, from 0 to 1 of the body's length


class Faulty:
    """A Transport. `next_number` counts the exchanges of the device, which address what befalls them."""

    def __init__(
        self,
        inner: Transport,
        clock: Clock,
        faults: FaultSpec,
        *,
        seed: int,
        device: int,
        next_number: Callable[[], int],
    ) -> None:
        self._inner, self._clock, self._faults = inner, clock, faults
        self._seed, self._device, self._next_number = seed, device, next_number

    async def enroll(self, message: Enroll) -> Enrolled:
        return await self._exchange(self._fate(), lambda: self._inner.enroll(message))

    async def check_in(self, message: CheckIn | AsTold) -> CheckInAnswer:
        return await self._exchange(self._fate(), lambda: self._inner.check_in(message))

    async def bundle_file(self, bundle: str, name: str, offset: int) -> AsyncGenerator[bytes, None]:
        async for piece in self._inner.bundle_file(bundle, name, offset):
            yield piece

    async def version(self, sha256: str, limit_bytes: int, held: str | None = None) -> VersionBody:
        fate = self._fate()
        body = await self._exchange(fate, lambda: self._inner.version(sha256, limit_bytes, held))
        return replace(body, data=_corrupted(body.data, fate.place)) if fate.corrupt else body

    async def upload(self, lease: str, frame: bytes) -> Receipt:
        fate = self._fate()
        sent = _corrupted(frame, fate.place) if fate.corrupt else frame
        if fate.duplicate and not fate.lost_request:
            await self._inner.upload(lease, sent)
        return await self._exchange(fate, lambda: self._inner.upload(lease, sent))

    async def receipt(self, lease: str) -> Receipt:
        return await self._exchange(self._fate(), lambda: self._inner.receipt(lease))

    async def judge(self, lease: str, verdict: Verdict) -> None:
        await self._exchange(self._fate(), lambda: self._inner.judge(lease, verdict))

    async def fail(self, lease: str, failure: Failure) -> None:
        await self._exchange(self._fate(), lambda: self._inner.fail(lease, failure))

    async def leave(self, *, erase: bool) -> None:
        await self._exchange(self._fate(), lambda: self._inner.leave(erase=erase))

    async def close(self) -> None:
        await self._inner.close()

    def _fate(self) -> _Fate:
        faults = self._faults
        drawn = rng_for(self._seed, Purpose.FAULTS, self._next_number(), self._device).random(6)
        return _Fate(
            lost_request=bool(drawn[0] < faults.lost_request),
            lost_answer=bool(drawn[1] < faults.lost_answer),
            duplicate=bool(drawn[2] < faults.duplicate),
            corrupt=bool(drawn[3] < faults.corrupt),
            delay=bool(drawn[4] < faults.delay),
            place=float(drawn[5]),
        )

    async def _exchange(self, fate: _Fate, call: Callable[[], Coroutine[Any, Any, T]]) -> T:
        if fate.delay:
            await self._clock.sleep(self._faults.delay_s)
        if fate.lost_request:
            await self._time_out("the request was lost")
        answer = await call()
        if fate.lost_answer:
            await self._time_out("the answer was lost")
        return answer

    async def _time_out(self, why: str) -> NoReturn:
        await self._clock.sleep(self._faults.timeout_s)
        raise Unreachable(why)


def _corrupted(data: bytes, place: float) -> bytes:
    """The same with one byte changed."""
    at = min(int(place * len(data)), len(data) - 1)
    return data[:at] + bytes([data[at] ^ 0x55]) + data[at + 1 :] if data else data
