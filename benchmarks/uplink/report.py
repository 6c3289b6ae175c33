"""What the arms say together: bytes to a target, ratios, and the curves as one SVG."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean

from benchmarks.claims.case import Point
from benchmarks.uplink.arms import ArmResult
from benchmarks.uplink.http_bytes import HttpBytes

__all__ = [
    "AGAINST",
    "KILOBYTE",
    "Bytes",
    "Figures",
    "both_ways",
    "by_arm",
    "bytes_to",
    "down_with_headers",
    "figures_of",
    "finals",
    "frames_alone",
    "plot",
    "sent",
    "target_of",
    "up_with_headers",
    "with_headers",
]

OURS = (
    "Fed-SB r28 on value and output, in 2 turns, sign, falling rate"  #: the best for so few, on search rows
)
KILOBYTE = "Fed-SB r32 on value and output, sign, falling rate"  #: the best within a kilobyte, there too
FP32 = "FedTT r5, fp32"  #: whatever its rate: the best of these
LORA_DENSE = "LoRA r8, dense head, fp32"
LORA_FP32 = "LoRA r8, fp32"
BELOW_POINTS = 1.0  #: bytes are counted to an arm's own final accuracy less this

AGAINST = {
    "ours": OURS,
    "kilobyte": f"the same of {KILOBYTE}",
    "target_accuracy": "its own last accuracy, less a point",
    "accuracy_gap_points": f"{FP32}, at its best rate",
    "participation_bytes": LORA_FP32,
    "uplink_bytes_lora_fp32, total_bytes_lora_fp32": LORA_DENSE,
    "total_bytes_lora_coded": "the LoRA variant with our head and codec that has the target for fewest bytes",
    "bytes": "of bodies: frames, all check-ins and versions, head and metrics with them; HTTP's own, by the "
    "line `http` for each check-in, download and upload, are only in figures that say so",
}

Figures = dict[str, float | None]
Arms = Mapping[str, Sequence[ArmResult]]
Bytes = Callable[[Point], float]


def sent(point: Point) -> float:
    return point.sent_bytes


def frames_alone(point: Point) -> float:
    return point.frame_bytes


def both_ways(point: Point) -> float:
    return point.sent_bytes + point.received_bytes


def with_headers(of: Bytes, http: HttpBytes, runs: Sequence[ArmResult]) -> Bytes:
    """And HTTP's own bytes of all requests of each participation; those of answers where these count."""
    if not runs:
        return of
    cohort = runs[0].participations / runs[0].rounds
    check_ins = fmean(run.check_ins_mean for run in runs)
    headers = http.sent(check_ins) + (http.received(check_ins) if of is both_ways else 0.0)
    return lambda point: of(point) + headers * cohort * point.version


def bytes_to(results: Iterable[ArmResult], target: float, of: Bytes) -> float | None:
    """Bytes of all devices until the judged accuracy first reaches a target, linear between two versions.

    A mean over seeds; None where one of them never does.
    """
    found = [_crossing(result.curve, target, of) for result in results]
    return fmean(x for x in found if x is not None) if found and None not in found else None


def _crossing(curve: Sequence[Point], target: float, of: Bytes) -> float | None:
    before = curve[0]
    for point in curve:
        low, high = before.accuracy or 0.0, point.accuracy or 0.0
        if high >= target:
            share = (target - low) / (high - low) if high > low else 1.0
            return of(before) + share * (of(point) - of(before)) if point is not before else of(point)
        before = point
    return None


def _ratio(a: float | None, b: float | None) -> float | None:
    return round(a / b, 1) if a is not None and b else None


def by_arm(results: Iterable[ArmResult]) -> defaultdict[str, list[ArmResult]]:
    arms: defaultdict[str, list[ArmResult]] = defaultdict(list)
    for result in results:
        arms[result.arm].append(result)
    return arms


def target_of(results: Iterable[ArmResult], name: str = OURS) -> float | None:
    """The accuracy to which bytes are counted; None before the arm was run."""
    ours = by_arm(results)[name]
    return _final(ours) - BELOW_POINTS / 100 if ours else None


def figures_of(results: Sequence[ArmResult], http: HttpBytes) -> Figures:
    """The summary, of our shortest arm and then of that within a kilobyte; None for what is not stored."""
    larger = _figures(results, http, KILOBYTE)
    return _figures(results, http, OURS) | {f"kilobyte_{name}": value for name, value in larger.items()}


def _figures(results: Sequence[ArmResult], http: HttpBytes, name: str) -> Figures:
    """What one arm sends and what it buys, beside LoRA to that arm's target."""
    arms, target = by_arm(results), target_of(results, name)
    ours = arms[name]
    if target is None:
        return {}
    final = _final(ours)
    frames = fmean(run.frame_bytes_mean for run in ours)
    dense = [run for arm, runs in arms.items() if arm.startswith(LORA_DENSE) for run in runs]

    def over_ours(of: Bytes, lora: Bytes | None = None) -> float | None:
        return _ratio(_least(arms, LORA_DENSE, target, lora or of), bytes_to(ours, target, of))

    return {
        "uplink_mean_bytes": round(frames, 1),
        "uplink_worst_bytes": max(run.frame_bytes_worst for run in ours),
        "uplink_mean_bytes_with_http_headers": round(frames + http.update_sent, 1),
        "participation_up_bytes": round(fmean(run.sent_bytes_mean for run in ours), 1),
        "participation_up_bytes_with_http_headers": round(up_with_headers(ours, http), 1),
        "check_ins_mean": round(fmean(run.check_ins_mean for run in ours), 2),
        "downlink_mean_bytes": round(fmean(run.received_bytes_mean for run in ours), 1),
        "accuracy": round(final, 4),
        "accuracy_gap_points": _gap(arms, FP32, final),
        "target_accuracy": round(target, 4),
        "participation_bytes_lora_fp32_over_ours": _ratio(_frame(arms[LORA_FP32]), frames),
        "uplink_frame_bytes_lora_fp32_over_ours": over_ours(frames_alone),
        "uplink_bytes_lora_fp32_over_ours": over_ours(sent),
        "total_bytes_lora_fp32_over_ours": over_ours(both_ways),
        "uplink_bytes_lora_fp32_over_ours_with_http_headers": over_ours(
            with_headers(sent, http, ours), with_headers(sent, http, dense)
        ),
        "total_bytes_lora_fp32_over_ours_with_http_headers": over_ours(
            with_headers(both_ways, http, ours), with_headers(both_ways, http, dense)
        ),
        "uplink_bytes_lora_coded_over_ours": _ratio(
            _coded_lora(arms, target, sent), bytes_to(ours, target, sent)
        ),
        "total_bytes_lora_coded_over_ours": _ratio(
            _coded_lora(arms, target, both_ways), bytes_to(ours, target, both_ways)
        ),
        "seeds": len(ours),
    }


def _gap(arms: Arms, name: str, final: float) -> float | None:
    """Points by which the best of these arms ends above ours."""
    found = [_final(runs) for arm, runs in arms.items() if arm.startswith(name)]
    return round(100 * (max(found) - final), 2) if found else None


def _coded_lora(arms: Arms, target: float, of: Bytes) -> float | None:
    """The fewest bytes with which a LoRA variant with our head and codec reaches a target."""
    found = (
        bytes_to(runs, target, of)
        for name, runs in arms.items()
        if runs and "lora" in runs[0].method and runs[0].codec.coding == "range"
    )
    return min((size for size in found if size is not None), default=None)


def _least(arms: Arms, name: str, target: float, of: Bytes) -> float | None:
    """The fewest bytes with which one of these arms reaches a target."""
    found = [bytes_to(runs, target, of) for arm, runs in arms.items() if arm.startswith(name)]
    return min((size for size in found if size is not None), default=None)


def finals(runs: Sequence[ArmResult]) -> list[float]:
    """The last accuracy of each run."""
    return [run.curve[-1].accuracy or 0.0 for run in runs]


def _final(runs: Sequence[ArmResult]) -> float:
    return fmean(finals(runs))


def up_with_headers(runs: Sequence[ArmResult], http: HttpBytes) -> float:
    """All that a participation sends, HTTP's own with it."""
    return fmean(run.sent_bytes_mean + http.sent(run.check_ins_mean) for run in runs)


def down_with_headers(runs: Sequence[ArmResult], http: HttpBytes) -> float:
    return fmean(run.received_bytes_mean + http.received(run.check_ins_mean) for run in runs)


def _frame(runs: Sequence[ArmResult]) -> float | None:
    return fmean(run.frame_bytes_mean for run in runs) if runs else None


def plot(results: Iterable[ArmResult], path: Path) -> None:
    """Accuracy against the bytes of all devices, up and both ways: first seeds, a colour a method."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    first = {result.arm: result for result in reversed(list(results))}
    families = sorted({_family(result) for result in first.values()})
    colours = {family: f"C{at}" for at, family in enumerate(families)}
    figure, axes = pyplot.subplots(1, 2, figsize=(11, 5), sharey=True)
    for axis, of, title in zip(axes, (sent, both_ways), ("up", "up and down"), strict=True):
        for result in first.values():
            points = [point for point in result.curve if of(point)]
            axis.plot(
                [of(point) / 1e6 for point in points],
                [100 * (point.accuracy or 0) for point in points],
                color=colours[_family(result)],
                linestyle=_LINES.get(result.codec.quantise, ":"),
                linewidth=1.0,
            )
        axis.set_xscale("log")
        axis.set_xlabel(f"megabytes {title}, all devices together")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("accuracy on CLINC150, %")
    axes[0].set_ylim(60, None)
    for family in families:
        axes[1].plot([], [], color=colours[family], label=family)
    for codec, style in (*_LINES.items(), ("other codecs", ":")):
        axes[1].plot([], [], color="black", linestyle=style, label=codec)
    axes[1].legend(fontsize="small", loc="lower right")
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


_LINES = {"fp32": "-", "sign": "--"}


def _family(result: ArmResult) -> str:
    """Its method, and whether its head is dense: what comes before the rank in an arm's name."""
    method = re.split(r" r[0-9]", result.arm)[0]
    return f"{method}, dense head" if "dense head" in result.arm else method
