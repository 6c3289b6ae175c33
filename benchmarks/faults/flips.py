"""Every prefix and every single-bit flip of a valid upload: refused, or (with its checksum mended) taken.

Three kinds of damage: prefixes and flips as a network would make them, and flips that a device made itself,
with the right checksum over the wrong bytes. None may be answered with a 5xx or a broken connection, and the
sound frame is taken afterwards. One device sends thousands of frames, so the server has no limit on its rate:
what is refused was looked at.
"""

from __future__ import annotations

import struct
import zlib
from collections import Counter
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing

import numpy as np

from benchmarks.bundles import head_of
from benchmarks.faults.devices import CHECK_IN, Device, Habits, Notes
from benchmarks.faults.row import Outcome, Setting
from benchmarks.faults.server import ServerProcess, task_text
from fedtt.codec import encode_delta
from fedtt.errors import FedttError, Refused
from fedtt.layout import LiveSet
from fedtt.messages import Code, Plan, Receipt, Work
from fedtt.wire import UpdateHeader, encode_update, layout_tag

__all__ = ["damaged", "run"]

NUMBERS = 50
_NEVER = ("server_errors", "broken_answers", "taken_as_they_came", "sound_refused", "refused_too_many")
_FAULTS = {Code.INTERNAL, Code.BUSY}  #: with the status of a fault of the server's
#: name -> what its numbers are made, and more lines of the task's table of its codec
_CODECS = {
    "fp32": ("fp32", ""),
    "int4": ("int4", ""),
    "range": ("int8", 'coding = "range"\n'),
    "top_k": ("int4", 'coding = "range"\nkeep = 0.2\n'),
}
_CODED = b"\1"  #: a payload's first byte, where the entropy coder has made it shorter


async def run(setting: Setting) -> Outcome:
    return await damaged(setting, stride=37 if setting.quick else 1)


async def damaged(setting: Setting, *, stride: int) -> Outcome:
    """stride: of the lengths and bits that are tried; an odd one meets every bit of a byte."""
    counts = Counter(dict.fromkeys(_NEVER, 0))
    for codec, (quantise, more) in _CODECS.items():
        server = ServerProcess(setting.directory / codec / "data", options=("--device-rate", "none"))
        async with server.running():
            await server.open_task(task_text(quantise, more=more, cohort=100_000), NUMBERS)
            async with aclosing(_working(server)) as working:
                await _try_all(counts, codec, working, stride)
        setting.report.line(row="flips", codec=codec, **counts)
    return Outcome(
        figures=dict(counts),
        at_most=dict.fromkeys(_NEVER, 0.0),
        at_least={"prefixes": 1, "flips": 1, "mended_flips": 1, "sound_taken": len(_CODECS), "coded": 2},
    )


async def _try_all(
    counts: Counter[str], codec: str, working: AsyncGenerator[tuple[Device, Work], None], stride: int
) -> None:
    device, work = await anext(working)
    payload = _payload(work.plan)
    frame = _frame(payload)
    counts["coded"] += work.plan.codec.coding == "range" and payload.startswith(_CODED)
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


def _payload(plan: Plan) -> bytes:
    """Numbers of all sizes, few of them large, so that each codec has something to say."""
    rng = np.random.default_rng(0)
    delta = rng.standard_normal(NUMBERS).astype(np.float32) ** 3
    return encode_delta(plan.codec, LiveSet(head_of(NUMBERS).layout, plan.live), delta, rng)


def _frame(payload: bytes) -> bytes:
    tag = layout_tag(head_of(NUMBERS).layout)
    header = UpdateHeader(layout=tag, examples=1, steps=1, loss_first=1.0, loss_last=0.5)
    return encode_update(header, payload)


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
