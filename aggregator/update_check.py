"""Whether an update's content is what its task asked for: checked before it is acknowledged."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from msgspec.structs import replace

from fedtt.codec import CodecSpec, check_deltas, check_size, decode_delta
from fedtt.errors import WireError
from fedtt.label_counts import COUNT_LIMIT, encode_label_counts
from fedtt.label_estimate import estimated_label_counts, estimated_shares
from fedtt.layout import FactorLayout, LiveSet
from fedtt.messages import Code, Problem
from fedtt.optimiser import TrainingSpec
from fedtt.wire import UpdateHeader, decode_update, layout_tag

__all__ = ["Estimate", "Wanted", "check_update", "check_updates"]

Checked = tuple[UpdateHeader, bytes] | Problem
_NUMBERS_AT_ONCE = 1 << 16  #: looked at together: more leave a core's cache, and memory is new each time


class Estimate(NamedTuple):
    """That the counts of labels are estimated from the update; its last live numbers are the head's bias."""

    labels: int
    training: TrainingSpec


class Wanted(NamedTuple):
    """What a lease's plan asks of an update."""

    layout: FactorLayout
    live: tuple[int, ...]
    codec: CodecSpec
    labels: int = 0  #: of which it may bring counts; 0 where they were not asked for
    estimate: Estimate | None = None

    @property
    def live_set(self) -> LiveSet:
        return self.layout.live_set(self.live)


def check_update(frame: bytes, wanted: Wanted) -> Checked:
    """Header and payload of a sound update, else what is wrong with it.

    Where they are to be estimated, the header has the counts of labels that the update lets on.
    """
    checked = _taken_apart(frame, wanted)
    if not isinstance(checked, Problem):
        try:
            check_deltas(wanted.codec, wanted.live_set, [checked[1]])
        except WireError as error:
            return _not_finite(error)
    return _estimated(checked, wanted)


def check_updates(frames: Sequence[tuple[bytes, Wanted]]) -> list[Checked]:
    """The same for many; those of one plan are looked at together, block by block."""
    checked = [_taken_apart(frame, wanted) for frame, wanted in frames]
    alike: dict[tuple[str, tuple[int, ...], CodecSpec], list[int]] = {}
    for place, (_, wanted) in enumerate(frames):
        if not isinstance(checked[place], Problem):
            alike.setdefault((wanted.layout.digest, wanted.live, wanted.codec), []).append(place)
    for places in alike.values():
        wanted = frames[places[0]][1]
        step = max(1, _NUMBERS_AT_ONCE // wanted.live_set.size)
        for start in range(0, len(places), step):
            _check_numbers(checked, places[start : start + step], wanted)
    return [_estimated(one, wanted) for one, (_, wanted) in zip(checked, frames, strict=True)]


def _taken_apart(frame: bytes, wanted: Wanted) -> Checked:
    """Header and payload, whose numbers are not looked at yet."""
    try:
        header, payload = decode_update(frame, wanted.labels)
    except WireError as error:
        return Problem(code=Code.MALFORMED, detail=str(error)[:500], remedy="send the stored frame unchanged")
    if header.layout != layout_tag(wanted.layout):
        found, needed = header.layout.hex(), layout_tag(wanted.layout).hex()
        return _of_another_plan(f"the update is for layout {found}, the lease's plan needs {needed}")
    try:
        check_size(wanted.codec, wanted.live_set, len(payload))
    except WireError as error:
        return _of_another_plan(str(error))
    if header.examples < 1 or header.steps < 1:
        return Problem(
            code=Code.MALFORMED,
            detail="an update stands for at least one example and one step",
            remedy="give the lease back instead",
        )
    return header, payload


def _check_numbers(checked: list[Checked], places: Sequence[int], wanted: Wanted) -> None:
    """Put a Problem in the place of each update of one plan whose numbers no encoder writes."""
    payloads = [found[1] for place in places if not isinstance(found := checked[place], Problem)]
    try:
        check_deltas(wanted.codec, wanted.live_set, payloads)
    except WireError as error:
        if len(places) == 1:
            checked[places[0]] = _not_finite(error)
            return
        for place in places:
            _check_numbers(checked, [place], wanted)


def _estimated(checked: Checked, wanted: Wanted) -> Checked:
    if wanted.estimate is None or isinstance(checked, Problem):
        return checked
    header, payload = checked
    labels, training = wanted.estimate
    shift = decode_delta(wanted.codec, wanted.live_set, payload)[-labels:]
    shares = estimated_shares(shift, training, header.steps)
    counts = estimated_label_counts(shares, min(header.examples, COUNT_LIMIT))
    return replace(header, label_counts=encode_label_counts(counts)), payload


def _not_finite(error: WireError) -> Problem:
    remedy = "drop it; training diverged"
    return Problem(code=Code.NOT_FINITE, detail=str(error)[:500], remedy=remedy)


def _of_another_plan(detail: str) -> Problem:
    remedy = "drop it, check in again and train by the new plan"
    return Problem(code=Code.WRONG_LAYOUT, detail=detail, remedy=remedy)
