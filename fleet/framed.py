"""A transport whose every message goes through its bytes, as on the wire, without a wire."""

from __future__ import annotations

from collections.abc import AsyncGenerator

from fedtt.errors import Refused
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
    decode,
    decode_answer,
    decode_check_in,
    encode,
)
from fedtt.seams import Transport, VersionBody

__all__ = ["Framed"]


class Framed:
    """A Transport round another one: what it passes on and gives back is what the receiver would read."""

    def __init__(self, inner: Transport) -> None:
        self._inner = inner

    async def enroll(self, message: Enroll) -> Enrolled:
        try:
            answer = await self._inner.enroll(decode(encode(message), Enroll))
        except Refused as error:
            raise _framed(error) from None
        return decode(encode(answer), Enrolled)

    async def check_in(self, message: CheckIn | AsTold) -> CheckInAnswer:
        try:
            answer = await self._inner.check_in(decode_check_in(encode(message)))
        except Refused as error:
            raise _framed(error) from None
        return decode_answer(encode(answer))

    async def bundle_file(self, bundle: str, name: str, offset: int) -> AsyncGenerator[bytes, None]:
        async for piece in self._inner.bundle_file(bundle, name, offset):
            yield piece

    async def version(self, sha256: str, limit_bytes: int, held: str | None = None) -> VersionBody:
        return await self._inner.version(sha256, limit_bytes, held)

    async def upload(self, lease: str, frame: bytes) -> Receipt:
        try:
            answer = await self._inner.upload(lease, frame)
        except Refused as error:
            raise _framed(error) from None
        return decode(encode(answer), Receipt)

    async def receipt(self, lease: str) -> Receipt:
        return decode(encode(await self._inner.receipt(lease)), Receipt)

    async def judge(self, lease: str, verdict: Verdict) -> None:
        await self._inner.judge(lease, decode(encode(verdict), Verdict))

    async def fail(self, lease: str, failure: Failure) -> None:
        await self._inner.fail(lease, decode(encode(failure), Failure))

    async def leave(self, *, erase: bool) -> None:
        await self._inner.leave(erase=erase)

    async def close(self) -> None:
        await self._inner.close()


def _framed(error: Refused) -> Refused:
    return Refused(decode(encode(error.problem), Problem), error.retry_after_s)
