"""Whether a version is good enough to train from: what it came to on data that did not train it.

A version and the one before it are judged on the same examples, so that what differs between the people
who judge falls out of the comparison.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Literal

from msgspec import Meta, Struct

from fedtt.errors import ConfigError
from fedtt.messages import Judged, Verdict

__all__ = ["EvaluationSpec", "total", "worse"]

Positive = Annotated[int, Meta(ge=1, le=10**9)]
Seconds = Annotated[float, Meta(gt=0, le=30 * 86400)]


class EvaluationSpec(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How versions are judged before devices train from them."""

    by: Literal["devices", "file"] = "devices"  #: devices that did not train it, or `fedtt judge`
    measure: Literal["loss", "accuracy"] = "loss"
    bound: Annotated[float, Meta(ge=0, le=1000)] = 0.1  #: nats, or share of right answers, it may be worse by
    devices: Positive = 10  #: asked to judge each version
    quorum: Positive = 1  #: fewest of them whose verdict counts at the deadline
    examples: Positive = 256  #: of its own that a device judges by, at most
    deadline_s: Seconds = 600.0  #: after which a version that was not judged is held

    def __post_init__(self) -> None:
        if self.quorum > self.devices:
            raise ConfigError(
                "evaluation.quorum", self.quorum, f"a number from 1 to evaluation.devices = {self.devices}"
            )


def total(verdicts: Iterable[Verdict], *, most_examples: int) -> Verdict:
    """All of them as one, each weighted by its examples, of which it has at most so many."""
    weighted = [(min(verdict.examples, most_examples), verdict) for verdict in verdicts]
    count = sum(weight for weight, _ in weighted)

    def mean(side: Literal["before", "after"]) -> Judged:
        parts = [(weight, verdict.examples, getattr(verdict, side)) for weight, verdict in weighted]
        loss = sum(weight * judged.loss for weight, _, judged in parts) / count
        if any(judged.right is None for _, _, judged in parts):
            return Judged(loss=loss)
        right = sum(weight * judged.right / examples for weight, examples, judged in parts)
        return Judged(loss=loss, right=min(count, round(right)))

    return Verdict(examples=count, before=mean("before"), after=mean("after"))


def worse(spec: EvaluationSpec, verdict: Verdict) -> str | None:
    """Why a version is not released: it is worse than the one before by more than the bound; else None."""
    before, after = verdict.before, verdict.after
    on = f"on {verdict.examples} examples"
    if spec.measure == "loss":
        if after.loss - before.loss <= spec.bound:
            return None
        return f"its loss rose from {before.loss:.4f} to {after.loss:.4f} {on}, by more than {spec.bound:g}"
    if before.right is None or after.right is None:
        return "it was judged without an accuracy, by which the task goes"
    if (before.right - after.right) / verdict.examples <= spec.bound:
        return None
    was, now = (100 * right / verdict.examples for right in (before.right, after.right))
    return f"its accuracy fell from {was:.1f} to {now:.1f} % {on}, by more than {100 * spec.bound:g} points"
