"""Whether an update's content is what its task asked for: checked before it is acknowledged."""

from __future__ import annotations

from fedtt.codec import CodecSpec, check_size, decode_delta
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
    if header.layout != layout_tag(layout):
        found, needed = header.layout.hex(), layout_tag(layout).hex()
        return _of_another_plan(f"the update is for layout {found}, the lease's plan needs {needed}")
    try:
        check_size(codec, live_set, len(payload))
    except WireError as error:
        return _of_another_plan(str(error))
    if header.examples < 1 or header.steps < 1:
        return Problem(code=Code.MALFORMED, detail="an update stands for at least one example and one step")
    try:
        decode_delta(codec, live_set, payload)
    except WireError as error:
        return Problem(code=Code.NOT_FINITE, detail=str(error)[:500], remedy="drop it; training diverged")
    return header, payload


def _of_another_plan(detail: str) -> Problem:
    remedy = "drop it, check in again and train by the new plan"
    return Problem(code=Code.WRONG_LAYOUT, detail=detail, remedy=remedy)
