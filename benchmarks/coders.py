"""Which coder the integers of real updates want, and whether a rotation before quantising pays.

The deltas are those of an arm of `benchmarks.uplink` in fp32, in ten rounds of the fleet on CLINC150. Bytes
are a mean over updates, with scales; the error is that of a round's mean delta, relative to its square, and
so are those of what was rotated before, which compare at equal length. Nothing here is timed.
"""

from __future__ import annotations

import sqlite3
import zlib
from collections.abc import Callable, Iterator
from importlib import import_module
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray

from benchmarks.claims.bench import open_bench
from benchmarks.claims.case import fleet_of
from benchmarks.claims.data import prepared
from benchmarks.claims.plan import read_plan
from benchmarks.harness import Report, arguments, reporting
from benchmarks.uplink.__main__ import PLAN
from benchmarks.uplink.arms import WORK
from fedtt.codec import CodecSpec, coded, decode_delta, encode_delta, payload_bytes
from fedtt.layout import LiveSet
from fedtt.server_optimiser import ServerState
from fedtt.wire import decode_update
from fleet.experiment import prepare
from fleet.parcels import Answer, Failed
from fleet.run import run_fleet

ROUNDS, COHORT = 10, 10
Delta = NDArray[np.float32]
Integers = NDArray[np.int8]
Rounds = list[tuple[LiveSet, list[Delta]]]
FORMS = {
    "int8": CodecSpec(quantise="int8", coding="range"),
    "int4": CodecSpec(quantise="int4", coding="range"),
    "int3": CodecSpec(quantise="int3", coding="range"),
    "int2": CodecSpec(quantise="int2", coding="range"),
    "ternary": CodecSpec(quantise="ternary", coding="range"),
    "ternary_stochastic": CodecSpec(quantise="ternary", rounding="stochastic", coding="range"),
    "ternary_keep_0.25": CodecSpec(quantise="ternary", keep=0.25, coding="range"),
    "ternary_keep_0.1": CodecSpec(quantise="ternary", keep=0.1, coding="range"),
    "sign": CodecSpec(quantise="sign", coding="range"),
    "rms_0.5": CodecSpec(quantise="rms", step=0.5, coding="range"),
    "rms_1": CodecSpec(quantise="rms", step=1.0, coding="range"),
    "rms_1.4": CodecSpec(quantise="rms", step=1.4, coding="range"),
    "rms_2": CodecSpec(quantise="rms", step=2.0, coding="range"),
    "int4_keep_0.25": CodecSpec(quantise="int4", keep=0.25, coding="range"),
}
ROTATED = ("int4", "int3", "ternary", "sign", "rms_0.5", "rms_1", "rms_1.4", "rms_2")
SEGMENTS = (2, 3, 5)


def rounds(arm: str, kept: Path | None) -> Iterator[tuple[LiveSet, list[Delta]]]:
    """The live set and the deltas of each round; kept: the directory of such a run, else one is made."""
    plan = read_plan(PLAN)
    case = next(case for case in plan.cases() if case.arm.name == arm)
    task = plan.task | {"rounds": {"count": ROUNDS, "cohort": COHORT}}
    plan = msgspec.structs.replace(plan, task=task, judge_every=ROUNDS)
    case = msgspec.structs.replace(case, plan=plan)
    data = prepared(case.set.name, judged_rows=1)
    options = case.settings("model")
    station = open_bench(options.pop("base", "minilm")).station(options, data.labels)
    spec, directory = fleet_of(case, data, station), kept or WORK / "deltas"
    if kept is None:
        run_fleet(prepare(spec), directory, pool=station.pool, judge=station.judge)
    adapter = station.bundle.manifest.adapter
    nothing = np.zeros(0, np.float32)
    state = ServerState(first=nothing, second=nothing, norms=nothing)  # of a task that has folded
    found = list(_stored(directory / "computed.sqlite"))
    for number in range(len(found) // COHORT):
        yield (
            spec.task.method.live(adapter, number + 1, state if number else None),
            found[number * COHORT : (number + 1) * COHORT],
        )


def _stored(path: Path) -> Iterator[Delta]:
    with sqlite3.connect(f"file:{path}?mode=ro", uri=True) as database:
        for (data,) in database.execute("SELECT answer FROM training ORDER BY number"):
            answer = msgspec.msgpack.decode(data, type=Answer)
            if not isinstance(answer, Failed):
                yield np.frombuffer(decode_update(answer.update.frame)[1], "<f4")


def entropy_bytes(q: Integers) -> float:
    _, counts = np.unique(q, return_counts=True)
    return float(-(counts * np.log2(counts / counts.sum())).sum() / 8)


def deflate_bytes(q: Integers) -> float:
    """The shorter of Huffman alone and with matches, one byte a number."""
    sizes = []
    for strategy in (zlib.Z_DEFAULT_STRATEGY, zlib.Z_HUFFMAN_ONLY):
        coder = zlib.compressobj(9, zlib.DEFLATED, -15, 9, strategy)
        sizes.append(len(coder.compress(q.tobytes()) + coder.flush()))
    return float(min(sizes))


def rice_bytes(q: Integers) -> float:
    """Golomb-Rice of |k| with the best parameter, and a sign where k is not 0."""
    sizes = np.abs(q.astype(np.int64))
    best = min(int(((sizes >> k) + 1 + k).sum()) for k in range(7))
    return (best + int((sizes > 0).sum()) + 3) / 8


def gaps_bytes(q: Integers) -> float:
    """The places of what is not 0 as Golomb-Rice of their gaps, as in EcoLoRA, and then those numbers."""
    at = np.flatnonzero(q)
    gaps = np.diff(np.concatenate([[-1], at])) - 1
    best = min(int(((gaps >> k) + 1 + k).sum()) for k in range(10))
    return best / 8 + rice_bytes((np.abs(q[at]) - 1).astype(np.int8)) + len(at) / 8


def static_bytes(q: Integers) -> float:
    """constriction's range coder under the update's own frequencies, with 12 bits for each of the table."""
    constriction = import_module("constriction")  # pip install constriction
    symbols, counts = np.unique(q, return_counts=True)
    places = np.searchsorted(symbols, q).astype(np.int32)
    chances = (counts / counts.sum()).astype(np.float32)
    model = constriction.stream.model.Categorical(chances, perfect=False)
    coder = constriction.stream.queue.RangeEncoder()
    coder.encode(places, model)
    return 4 * len(coder.get_compressed()) + 1.5 * len(symbols)


CODERS: dict[str, Callable[[Integers], float]] = {
    "entropy": entropy_bytes,
    "deflate": deflate_bytes,
    "golomb_rice": rice_bytes,
    "golomb_gaps": gaps_bytes,
}
if find_spec("constriction"):
    CODERS["static_range"] = static_bytes


class Rotation:
    """Of each factor by signs that are drawn and Walsh-Hadamard transforms, orthonormal.

    A factor is cut into runs of 2^k numbers, so that a rotated delta has as many numbers as before. Each
    update has signs of its own, for errors of devices that share them are more alike (S. Vargaftik et al.,
    "DRIVE: one-bit distributed mean estimation", NeurIPS 2021, arXiv 2105.08339).
    """

    def __init__(self, live: LiveSet, seed: int) -> None:
        self._runs = [run for size in live.sizes for run in runs_of(size)]
        self._signs = np.random.default_rng(seed).choice([-1.0, 1.0], live.size)

    def turned(self, delta: Delta) -> Delta:
        found: Delta = self._transformed(delta * self._signs).astype(np.float32)
        return found

    def back(self, turned: Delta) -> Delta:
        """The inverse of `turned`."""
        found: Delta = (self._transformed(turned.astype(np.float64)) * self._signs).astype(np.float32)
        return found

    def _transformed(self, x: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.concatenate([hadamard(part) for part in np.split(x, np.cumsum(self._runs)[:-1])])


def runs_of(size: int) -> list[int]:
    """40 -> 32, 8: powers of two that fall."""
    return [1 << bit for bit in reversed(range(size.bit_length())) if size >> bit & 1]


def hadamard(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """The orthonormal Walsh-Hadamard transform of 2^k numbers, its own inverse."""
    size, width = len(x), 1
    while width < size:
        x = x.reshape(-1, 2, width)
        x = np.stack([x[:, 0] + x[:, 1], x[:, 0] - x[:, 1]], axis=1).reshape(-1)
        width *= 2
    turned: NDArray[np.float64] = x / np.sqrt(size)
    return turned


def integers(codec: CodecSpec, live: LiveSet, payload: bytes) -> tuple[Integers, int]:
    """What a coded payload holds, all blocks together, and how many scales."""
    runs = coded.decode(codec.levels, codec.scale_bits, payload[1:], [(1, size) for size in live.sizes])
    return np.concatenate([q[0, 0] for q, _ in runs]), len(runs)


def measure(
    report: Report, name: str, codec: CodecSpec, data: Rounds, *, rotated: bool = False
) -> dict[str, float]:
    """Bytes by coder, and the error of a round's mean; rotated: before quantising, and back after."""
    totals: dict[str, float] = {"plain": 0.0, "range": 0.0, **dict.fromkeys(CODERS, 0.0)}
    error = square = 0.0
    count = 0
    for live, deltas in data:
        arrived = []
        for delta in deltas:
            rotation = Rotation(live, count) if rotated else None
            sent = rotation.turned(delta) if rotation else delta
            payload = encode_delta(codec, live, sent, np.random.default_rng(count))
            found = decode_delta(codec, live, payload)
            arrived.append(rotation.back(found) if rotation else found)
            count += 1
            totals["plain"] += payload_bytes(codec, live)
            totals["range"] += len(payload)
            if payload[0]:
                q, scales = integers(codec, live, payload)
                for coder, size in CODERS.items():
                    totals[coder] += size(q) + 2 * scales
        mean = np.mean(deltas, axis=0)
        error += float(((np.mean(arrived, axis=0) - mean) ** 2).sum())
        square += float((mean**2).sum())
    sizes = {coder: round(total / count, 1) for coder, total in totals.items()}
    report.line(quantiser=name, rotated=rotated, error_of_mean=round(error / square, 4), bytes_mean=sizes)
    return sizes | {"error": round(error / square, 4)}


def segments_error(parts: int, data: Rounds) -> float:
    """What averaging each segment over its own part of the cohort loses of the mean over the whole cohort.

    Round-robin segments: H. Liu et al. "EcoLoRA: communication-efficient federated fine-tuning of large
    language models". EMNLP 2025, arXiv 2506.02001, §3.2; here without any rounding.
    """
    error = square = 0.0
    for _, deltas in data:
        mean = np.mean(deltas, axis=0)
        own = [np.mean(deltas[part::parts], axis=0) for part in range(parts)]
        cuts = np.linspace(0, mean.size, parts + 1).astype(int)
        pieces = [x[a:b] for x, (a, b) in zip(own, pairwise(cuts), strict=True)]
        error += float(((np.concatenate(pieces) - mean) ** 2).sum())
        square += float((mean**2).sum())
    return error / square


def shared_share(data: Rounds) -> float:
    """What of a delta's square all devices have in common: ⟨Δ_i, Δ_j⟩ of different devices over ‖Δ‖²."""
    between = own = 0.0
    for _, deltas in data:
        count, stacked = len(deltas), np.stack(deltas).astype(np.float64)
        squares = float((stacked**2).sum())
        between += (float((stacked.sum(0) ** 2).sum()) - squares) / (count * (count - 1))
        own += squares / count
    return between / own


def main() -> None:
    parser = arguments("coders", "bytes of real updates under each coder")
    parser.add_argument("--arm", default="exact FedTT r5, fp32", help="of benchmarks.uplink, in fp32")
    parser.add_argument("--run", type=Path, help="of a fleet of that arm: its directory")
    args = parser.parse_args()
    with reporting("coders", args.out) as report:
        data = [(live, deltas[:2] if args.quick else deltas) for live, deltas in rounds(args.arm, args.run)]
        figures: dict[str, float] = {}
        for name, codec in FORMS.items():
            found = measure(report, name, codec, data)
            figures |= {f"{name}_bytes": found["range"], f"{name}_error": found["error"]}
            figures[f"{name}_deflate_over_range"] = round(found["deflate"] / found["range"], 3)
        for name in ROTATED:
            found = measure(report, name, FORMS[name], data, rotated=True)
            figures |= {f"{name}_rotated_bytes": found["range"], f"{name}_rotated_error": found["error"]}
        figures["shared_share"] = round(shared_share(data), 4)
        for parts in SEGMENTS:
            figures[f"segments_{parts}_error"] = round(segments_error(parts, data), 4)
        report.summary(
            figures,
            {
                "arm": args.arm,
                "error": "of a round's mean delta, squared, over the mean's own square",
                "shared_share": "the inner product of two devices' deltas, over the square of one",
            },
        )


if __name__ == "__main__":
    main()
