"""Whether a version is good enough to train from: what it came to on data that did not train it.

A version and the one before it are judged on the same examples, so that what differs between the people
who judge falls out of the comparison. Each verdict counts the same, and the middle of their differences
decides: D. Yin, Y. Chen, K. Ramchandran, P. Bartlett. "Byzantine-robust distributed learning: towards optimal
statistical rates". ICML 2018, arXiv 1803.01498 (Definition 2, of one number, β = 1/3).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Annotated, Literal

from msgspec import Meta, Struct

from fedtt.errors import ConfigError
from fedtt.messages import Judged, Verdict

__all__ = ["EvaluationSpec", "Measure", "counts", "measured", "middle", "worse"]

Positive = Annotated[int, Meta(ge=1, le=10**9)]
Seconds = Annotated[float, Meta(gt=0, le=30 * 86400)]
Measure = Literal["loss", "accuracy"]
_ENOUGH = 3  #: of two verdicts, either moves the middle as far as it likes


class EvaluationSpec(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How versions are judged before devices train from them."""

    by: Literal["devices", "file"] = "devices"  #: devices that did not train it, or `fedtt judge`
    measure: Measure = "loss"
    bound: Annotated[float, Meta(ge=0, le=1000)] = 0.1  #: nats, or share of right answers, it may be worse by
    devices: Positive = 10  #: asked to judge each version
    quorum: Positive | None = None  #: fewest of them whose verdict counts at the deadline; None for 3, or all
    examples: Positive = 256  #: of its own that a device judges by, at most
    deadline_s: Seconds = 600.0  #: after which a version that was not judged is held

    def __post_init__(self) -> None:
        if self.least > self.devices:
            raise ConfigError(
                "evaluation.quorum", self.quorum, f"a number from 1 to evaluation.devices = {self.devices}"
            )

    @property
    def least(self) -> int:
        """Verdicts with which the deadline settles a version."""
        return min(_ENOUGH, self.devices) if self.quorum is None else self.quorum


def counts(spec: EvaluationSpec, verdict: Verdict) -> bool:
    """Whether a device's verdict has the task's measure, on no more examples than it was asked for."""
    return _worse_by(verdict, spec.measure) is not None and verdict.examples <= spec.examples


def middle(values: Sequence[float]) -> float:
    """The mean of n >= 1 values without the ⌊n/3⌋ highest and the ⌊n/3⌋ lowest.

    Whatever ⌊n/3⌋ of them are, it lies between the lowest and the highest of the others.
    """
    cut = len(values) // 3
    kept = sorted(values)[cut : len(values) - cut]
    return min(max(fmean(kept), kept[0]), kept[-1])  # rounding takes it out of neither


def measured(spec: EvaluationSpec, verdicts: Sequence[Verdict]) -> dict[str, float]:
    """What people read of one or more verdicts in a version's report.

    `judged_worse_by` decides (nats, or share of right answers; below 0 for better). The others are each the
    middle of their own values, so that they need not differ by just as much.
    """
    found = {
        "judged_verdicts": float(len(verdicts)),
        "judged_examples": float(sum(verdict.examples for verdict in verdicts)),
        "judged_loss_before": middle([verdict.before.loss for verdict in verdicts]),
        "judged_loss": middle([verdict.after.loss for verdict in verdicts]),
    }
    worse_by = [by for v in verdicts if (by := _worse_by(v, spec.measure)) is not None]
    if worse_by:
        found["judged_worse_by"] = middle(worse_by)
    for name, side in (("judged_accuracy_before", "before"), ("judged_accuracy", "after")):
        judged: list[tuple[Judged, int]] = [(getattr(v, side), v.examples) for v in verdicts]
        if shares := [one.right / examples for one, examples in judged if one.right is not None]:
            found[name] = middle(shares)
    return found


def worse(spec: EvaluationSpec, report: Mapping[str, float]) -> str | None:
    """Why a version that measured so is not released: it is worse by more than the bound; else None."""
    by = report.get("judged_worse_by")
    if by is None:
        return "it was judged without an accuracy, by which the task goes"
    if by <= spec.bound:
        return None
    count, examples = report["judged_verdicts"], f"{report['judged_examples']:.0f} examples"
    among = "in the mean" if count < 3 else "in the middle third"
    on = f"on {examples}" if count == 1 else f"{among} of {count:.0f} verdicts on {examples}"
    before, after = report[f"judged_{spec.measure}_before"], report[f"judged_{spec.measure}"]
    if spec.measure == "loss":
        return f"its loss rose by {by:.4f} {on}, more than {spec.bound:g}: from {before:.4f} to {after:.4f}"
    by, bound, before, after = (100 * share for share in (by, spec.bound, before, after))
    went = f"from {before:.1f} to {after:.1f} %"
    return f"its accuracy fell by {by:.1f} points {on}, more than {bound:g}: {went}"


def _worse_by(verdict: Verdict, measure: Measure) -> float | None:
    """On one device's examples, in nats or as a share of them; None where the verdict lacks the measure."""
    before, after = verdict.before, verdict.after
    if measure == "loss":
        return after.loss - before.loss
    if before.right is None or after.right is None:
        return None
    return (before.right - after.right) / verdict.examples
