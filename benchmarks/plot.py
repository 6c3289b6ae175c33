"""Draw the stored results: `python -m benchmarks.plot` writes one SVG beside each JSON-lines file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib import pyplot as plt

from benchmarks.harness import ROOT

RESULTS = ROOT / "benchmarks" / "results"


def judged_rounds(path: Path) -> list[dict[str, Any]]:
    """The lines of a federated run that carry a judgement."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [line for line in lines if "round" in line and "loss" in line]


def draw(path: Path, rounds: list[dict[str, Any]]) -> Path:
    """Accuracy, or loss where there are no labels, against rounds and against bytes sent up."""
    measure = "accuracy" if rounds[0]["accuracy"] is not None else "loss"
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2), sharey=True, layout="constrained")
    values = [line[measure] for line in rounds]
    left.plot([line["round"] for line in rounds], values, marker="o", markersize=3)
    left.set(xlabel="round", ylabel=measure, title=path.stem)
    right.plot([line["uplink_bytes"] / 1e6 for line in rounds], values, marker="o", markersize=3)
    right.set(xlabel="MB sent up by all devices", title="4-bit FedTT")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    target = path.with_suffix(".svg")
    figure.savefig(target, metadata={"Date": None})
    plt.close(figure)
    return target


def main() -> None:
    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "fedtt"  # the same data gives the same file
    for path in sorted(RESULTS.glob("*.jsonl")):
        if rounds := judged_rounds(path):
            print(draw(path, rounds))


if __name__ == "__main__":
    main()
