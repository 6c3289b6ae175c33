"""Events as lines for people."""

from __future__ import annotations

from edge_client import events
from edge_client.events import Event
from fedtt.cli import one_line

__all__ = ["describe"]


def describe(event: Event) -> str:
    """One line for a person; no line quotes an example, but for the reason a lease was given back.

    What it quotes of a server begins no line of its own and is no command to a terminal.
    """
    return one_line(_step(event) or _progress(event))


def _step(event: Event) -> str:
    match event:
        case events.Enrolled():
            return f"enrolled as {event.device}"
        case events.Granted():
            return f"round {event.round} of {event.task}: work on version {event.version_number}"
        case events.Waiting():
            return f"waiting {event.pause_s:.0f} s: {event.reason or 'no work'}"
        case events.Trained():
            cut = f", {event.cut_texts} texts cut" if event.cut_texts else ""
            how = _prefixes(event) + _epsilon(event)
            return (
                f"trained {event.steps} steps on {event.examples} examples in {event.wall_s:.1f} s, "
                f"loss {event.loss_first:.3f} to {event.loss_last:.3f}, {event.frame_bytes} bytes{cut}{how}"
            )
        case events.Acknowledged():
            return f"update taken ({event.receipt.state.value})"
        case events.Dropped():
            return f"update dropped: {event.reason}"
        case events.GaveUp():
            return f"gave the work back ({event.code.value}): {event.detail}"
        case events.Retrying():
            return f"failed, to be tried again after {event.pause_s:.1f} s: {event.error}"
        case events.Retired():
            return f"the server has retired this device: {event.reason}"
        case _:
            return ""


def _progress(event: Event) -> str:
    match event:
        case events.Judged():
            return (
                f"judged version {event.version_number} of {event.task} on {event.examples} examples: "
                f"loss {event.loss_before:.3f} before, {event.loss:.3f} now"
            )
        case events.Resting():
            return f"resting {event.pause_s:.0f} s: {event.reason}"
        case events.Downloading():
            resumed = f", resumed at {event.offset}" if event.offset else ""
            return f"downloading {event.file} ({event.bytes} bytes{resumed})"
        case events.Redownloading():
            return f"{event.file} is damaged: downloading it again"
        case events.Downloaded():
            return f"bundle {event.bundle[:12]} is complete ({event.bytes} bytes)"
        case events.Paused():
            return "paused by its owner"
        case events.Ended():
            return f"ended: sent {event.sent_bytes} bytes, received {event.received_bytes}"
        case _:
            return type(event).__name__


def _epsilon(event: events.Trained) -> str:
    return "" if event.epsilon is None else f", epsilon {event.epsilon:.3g} by now"


def _prefixes(event: events.Trained) -> str:
    if event.depth is None:
        return ""
    blocks = f"the last {event.depth} blocks" if event.depth else "the head"
    rows = event.prefixes_computed + event.prefixes_reused
    return f", {blocks} alone, {event.prefixes_reused} of {rows} rows from kept activations"
