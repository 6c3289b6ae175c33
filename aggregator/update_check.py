"""Whether an update's content is what its task asked for: checked before it is acknowledged."""

from __future__ import annotations

from fedtt.codec import CodecSpec, decode_delta, payload_bytes
from fedtt.errors import WireError
from fedtt.layout import FactorLayout
from fedtt.messages import Code, Problem
from fedtt.wire import UpdateHeader, decode_update, layout_tag

__all__ = ["check_update"]


def check_update(
    frame: bytes, layout: FactorLayout, live: tuple[int, ...], codec: CodecSpec, labels: int = 0
) -> tuple[UpdateHeader, bytes] | Problem:
    """Header and payload of a sound update, else what is wrong with it.

    labels: of which it may bring counts; 0 where they were not asked for.
    """
    try:
        header, payload = decode_update(frame, labels)
    except WireError as error:
        return Problem(code=Code.MALFORMED, detail=str(error)[:500], remedy="send the stored frame unchanged")
    live_set = layout.live_set(live)
    tag, expected = layout_tag(layout), payload_bytes(codec, live_set)
    if header.layout != tag or len(payload) != expected:
        return Problem(
            code=Code.WRONG_LAYOUT,
            detail=f"the update is for layout {header.layout.hex()} with {len(payload)} payload bytes, "
            f"the lease's plan needs {tag.hex()} with {expected}",
            remedy="drop it, check in again and train by the new plan",
        )
    if header.examples < 1 or header.steps < 1:
        return Problem(code=Code.MALFORMED, detail="an update stands for at least one example and one step")
    try:
        decode_delta(codec, live_set, payload)
    except WireError as error:
        return Problem(code=Code.NOT_FINITE, detail=str(error)[:500], remedy="drop it; training diverged")
    return header, payload
