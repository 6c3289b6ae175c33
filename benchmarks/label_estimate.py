"""How well labels are estimated from updates, and whether groups by them are as near-IID as by true labels.

    python -m benchmarks.label_estimate

A real fleet on CLINC150 goes through the warm-up of `hier-fedlora` and `hier-fedtt`, and each update it sends
is read as the aggregator reads it. Estimates of a device's last update stand beside its true counts: their
correlation over labels and their total variation distance, both means over devices. Groups are formed by
`near_iid` of either, of true counts with noise, and at random; their divergence (bits, mean over groups and
40 draws of five sixths of the devices) is that of their true labels. `proxy_...` is what a public proxy would
give in place of the bias: how far the mean logits over 100 development rows moved with the whole update,
which takes the model, and data like the devices'.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from aggregator.update_check import Estimate, Wanted, check_update
from benchmarks.claims.bench import Station, open_bench
from benchmarks.claims.data import WORK, DataSet, prepared
from benchmarks.harness import arguments, reporting
from edge_client.bundle import RuntimeName
from edge_client.example_files import read_examples
from edge_client.examples import Example, label_index
from edge_client.tokens import Tokens
from edge_client.trainer import LocalUpdate, TrainingRequest
from fedtt.algorithms.near_iid import Member, divergence, near_iid
from fedtt.codec import decode_delta
from fedtt.label_counts import decode_label_counts, noisy_label_counts
from fedtt.layout import LiveSet
from fedtt.messages import Problem
from fedtt.rng import Purpose, rng_for
from fedtt.task import read_task
from fedtt.wire import decode_theta, decode_update
from fleet.experiment import prepare
from fleet.pool import Handle, Pool
from fleet.run import run_fleet
from fleet.spec import FleetFile, FleetSpec

DEVICES, GROUPS, WARMUP, PROXY_ROWS, DRAWS = 100, 3, 2, 100, 40
#: name -> adapter, partition, training, codec
CASES: dict[str, tuple[str, float, dict[str, Any], dict[str, Any]]] = {
    "lora_0.1": ("lora", 0.1, {}, {"quantise": "fp32"}),
    "lora_0.5": ("lora", 0.5, {}, {"quantise": "fp32"}),
    "tt_0.1": ("tt", 0.1, {}, {"quantise": "fp32"}),
    "lora_0.1_sign": ("lora", 0.1, {}, {"quantise": "sign", "coding": "range"}),
    "lora_0.1_sgd": ("lora", 0.1, {"optimiser": "sgd", "learning_rate": 0.5}, {"quantise": "fp32"}),
}
Vector = NDArray[np.float64]


class Recording:
    """A pool that remembers of each device the last training it computed."""

    def __init__(self, inner: Pool) -> None:
        self._inner = inner
        self.last: dict[str, tuple[TrainingRequest, LocalUpdate]] = {}

    @property
    def runtime(self) -> RuntimeName:
        return self._inner.runtime

    def submit(self, request: TrainingRequest) -> Handle:
        return _Recorded(self, request, self._inner.submit(request))

    def close(self) -> None:
        self._inner.close()


class _Recorded:
    def __init__(self, pool: Recording, request: TrainingRequest, handle: Handle) -> None:
        self._pool, self._request, self._handle = pool, request, handle

    def result(self) -> LocalUpdate:
        update = self._handle.result()
        self._pool.last[self._request.device] = self._request, update
        return update

    def cancel(self) -> None:
        self._handle.cancel()


def main() -> None:
    parser = arguments("label_estimate", __doc__ or "")
    args = parser.parse_args()
    cases = dict(list(CASES.items())[:1]) if args.quick else CASES
    figures: dict[str, object] = {}
    with reporting("label_estimate", args.out) as report:
        data = prepared("clinc150", train_rows=6000, judged_rows=500)
        for name, (adapter, alpha, training, codec) in cases.items():
            rank = {"lora": 8, "tt": 5}[adapter]
            options = {"adapter": adapter, "rank": rank, "depth": 2, "max_tokens": 32}
            station = open_bench("minilm").station(options, data.labels)
            pool = lived(data, station, adapter, alpha, training, codec, args.seed)
            found = measured(data, station, pool, args.seed)
            report.line(case=name, **found)
            figures |= {f"{name}_{figure}": value for figure, value in found.items()}
        report.summary(figures, {})


def lived(
    data: DataSet,
    station: Station,
    adapter: str,
    alpha: float,
    training: dict[str, Any],
    codec: dict[str, Any],
    seed: int,
) -> Recording:
    """The trainings of a fleet up to where its groups are formed."""
    task = {
        "name": "labels",
        "seed": seed,
        "rounds": {"count": WARMUP + 1, "cohort": DEVICES // 2, "deadline_s": 7200.0},
        "training": {"learning_rate": 0.015, "local_steps": 4, "batch_size": 12} | training,
        "codec": codec,
        "method": {
            "name": f"hier-fed{adapter}",
            "groups": GROUPS,
            "warmup_rounds": WARMUP,
            "label_source": "updates",
        },
    }
    raw = {
        "fleet": {"seed": seed, "devices": DEVICES},
        "bundle": str(station.bundle.directory),
        "data": {"train": str(data.train), "partition": {"kind": "dirichlet", "alpha": alpha}},
    }
    parts = msgspec.convert(raw, FleetFile, dec_hook=lambda _, value: Path(value))
    fields = {name: getattr(parts, name) for name in FleetFile.__struct_fields__}
    experiment = prepare(FleetSpec(task=read_task(task), **fields))
    directory, pool, reached = WORK / "runs" / "label-estimate", Recording(station.pool), [0]
    run_fleet(
        experiment,
        directory,
        fresh=True,
        pool=pool,
        judge=station.judge,
        on_version=lambda line: reached.append(line.version),
        stopped=lambda: reached[-1] >= WARMUP,
    )
    shutil.rmtree(directory)
    return pool


def measured(data: DataSet, station: Station, pool: Recording, seed: int) -> dict[str, float]:
    classes, rows = len(data.labels), read_examples(data.search)[:PROXY_ROWS]
    true, estimated, proxied = [], [], []
    for request, update in pool.last.values():
        held = [label_index(example, data.labels) for example in request.examples.read()]
        true.append(np.bincount(held, minlength=classes))
        estimated.append(counts_of(request, update, classes))
        proxied.append(moved(station, request, update, rows))
    noise = rng_for(seed, Purpose.PARTITION).random
    noisy = {
        epsilon: [
            decode_label_counts(
                noisy_label_counts(np.repeat(range(classes), c).tolist(), classes, epsilon, noise), classes
            )
            for c in true
        ]
        for epsilon in (8.0, 1.0)
    }
    by: dict[str, list[NDArray[np.int64]] | None] = {
        "true": true,
        "estimated": estimated,
        "epsilon_8": noisy[8.0],
        "epsilon_1": noisy[1.0],
    }
    by |= {"proxy": proxied, "random": None}
    return {
        "devices": len(true),
        **compared(estimated, true, "estimate_"),
        **compared(proxied, true, "proxy_"),
        **{f"divergence_{name}_bits": of_groups(labels, true, seed) for name, labels in by.items()},
    }


def counts_of(request: TrainingRequest, update: LocalUpdate, classes: int) -> NDArray[np.int64]:
    """What the aggregator makes of an update."""
    plan, layout = request.plan, request.bundle.manifest.adapter.layout
    wanted = Wanted(layout, plan.live, plan.codec, estimate=Estimate(classes, plan.training))
    checked = check_update(update.frame, wanted)
    if isinstance(checked, Problem):
        raise RuntimeError(f"an update of the fleet is refused: {checked.detail}")
    return decode_label_counts(checked[0].label_counts, classes)


def moved(
    station: Station, request: TrainingRequest, update: LocalUpdate, rows: list[Example]
) -> NDArray[np.int64]:
    """Thousandths, in proportion to how far a label's mean logit rose above the median label's."""
    adapter = request.bundle.manifest.adapter
    before = decode_theta(request.version, adapter.layout, request.plan.version)
    live = LiveSet(adapter.layout, request.plan.live)
    _, payload = decode_update(update.frame)
    after = before + live.scatter(decode_delta(request.plan.codec, live, payload))
    batch, _ = Tokens(request.bundle, 32).batch([row.words for row in rows])
    rose = (station.judge.logits(after, batch) - station.judge.logits(before, batch)).mean(axis=0)
    above = np.maximum(rose - np.median(rose), 0.0)
    thousandths: NDArray[np.int64] = np.rint(1000 * above / above.sum()).astype(np.int64)
    return thousandths


def compared(
    estimated: list[NDArray[np.int64]], true: list[NDArray[np.int64]], name: str
) -> dict[str, float]:
    correlations, distances = [], []
    for found, counts in zip(estimated, true, strict=True):
        p, q = counts / counts.sum(), found / max(1, found.sum())
        correlations.append(np.corrcoef(p, q)[0, 1] if found.any() else 0.0)
        distances.append(np.abs(p - q).sum() / 2)
    return {
        f"{name}correlation": round(float(np.mean(correlations)), 3),
        f"{name}total_variation": round(float(np.mean(distances)), 3),
    }


def of_groups(labels: list[NDArray[np.int64]] | None, true: list[NDArray[np.int64]], seed: int) -> float:
    """Mean divergence of groups' true labels from everybody's; groups by these labels, or at random."""
    found = []
    for number in range(DRAWS):
        drawn = rng_for(seed, Purpose.PARTITION, number).permutation(len(true))[: len(true) * 5 // 6].tolist()
        members = [Member(labels=labels[i] if labels else None) for i in drawn]
        chosen = np.array(near_iid(members, GROUPS, 0.0))
        counts = np.array([true[i] for i in drawn], np.float64)
        sums = np.array([counts[chosen == group].sum(axis=0) for group in range(GROUPS)])
        found.append(divergence(sums, counts.sum(axis=0)).mean())
    return round(float(np.mean(found)), 4)


if __name__ == "__main__":
    main()
