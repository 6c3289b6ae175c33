"""Every prefix and every single-bit flip of a valid upload: refused, or (with its checksum mended) taken.

Three kinds of damage: prefixes and flips as a network would make them, and flips that a device made itself,
with the right checksum over the wrong bytes. None may be answered with a 5xx or a broken connection, and the
sound frame is taken afterwards.
"""

from __future__ import annotations

import struct
import zlib
from collections import Counter
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing

from benchmarks.faults.devices import CHECK_IN, Device, Habits, Notes, frame_of
from benchmarks.faults.row import Outcome, Setting
from benchmarks.faults.server import ServerProcess, task_text
from fedtt.errors import FedttError, Refused
from fedtt.messages import Code, Receipt, Work

__all__ = ["damaged", "run"]

NUMBERS = 50
_FAULTS = {Code.INTERNAL, Code.BUSY}  #: with the status of a fault of the server's
_CODECS = ("fp32", "int4")


async def run(setting: Setting) -> Outcome:
    return await damaged(setting, stride=37 if setting.quick else 1)


async def damaged(setting: Setting, *, stride: int) -> Outcome:
    """stride: of the lengths and bits that are tried; an odd one meets every bit of a byte."""
    counts: Counter[str] = Counter()
    for codec in _CODECS:
        server = ServerProcess(setting.directory / codec / "data")
        async with server.running():
            await server.open_task(task_text(codec, cohort=100_000), NUMBERS)
            async with aclosing(_working(server)) as working:
                await _try_all(counts, codec, working, stride)
        setting.report.line(row="flips", codec=codec, **counts)
    return Outcome(
        figures=dict(counts),
        at_most=dict.fromkeys(
            ("server_errors", "broken_answers", "taken_as_they_came", "sound_refused"), 0.0
        ),
        at_least={"prefixes": 1, "flips": 1, "mended_flips": 1, "sound_taken": len(_CODECS)},
    )


async def _try_all(
    counts: Counter[str], codec: str, working: AsyncGenerator[tuple[Device, Work], None], stride: int
) -> None:
    device, work = await anext(working)
    frame = frame_of(work.plan, NUMBERS, 7)
    counts.update(server_errors=0, broken_answers=0, taken_as_they_came=0, sound_refused=0)
    for length in range(0, len(frame), stride):
        counts["prefixes"] += 1
        counts["taken_as_they_came"] += await _send(counts, device, work, frame[:length])
    for flipped in _flips(frame, stride):
        counts["flips"] += 1
        counts["taken_as_they_came"] += await _send(counts, device, work, flipped)
    sound = await _send(counts, device, work, frame)
    counts["sound_taken" if sound else "sound_refused"] += 1
    device, work = await anext(working)
    for flipped in _flips(frame[:-4], stride):
        counts["mended_flips"] += 1
        mended = flipped + struct.pack("<I", zlib.crc32(flipped))
        if await _send(counts, device, work, mended):
            counts[f"mended_flips_taken_{codec}"] += 1
            device, work = await anext(working)


def _flips(data: bytes, stride: int) -> Iterator[bytes]:
    for bit in range(0, 8 * len(data), stride):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        yield bytes(flipped)


async def _send(counts: Counter[str], device: Device, work: Work, frame: bytes) -> bool:
    """Whether it was taken."""
    try:
        receipt = await device.transport.upload(work.lease, frame)
        return isinstance(receipt, Receipt)
    except Refused as error:
        counts[f"refused_{error.problem.code.value}"] += 1
        counts["server_errors"] += error.problem.code in _FAULTS
    except FedttError:
        counts["broken_answers"] += 1
    return False


async def _working(server: ServerProcess) -> AsyncGenerator[tuple[Device, Work], None]:
    """New devices with a lease each."""
    for number in range(100_000):
        async with Device(number, server.url, NUMBERS, Notes(), Habits()) as device:
            await device.enroll(server.token)
            answer = await device.transport.check_in(CHECK_IN)
            assert isinstance(answer, Work), answer
            yield device, answer
