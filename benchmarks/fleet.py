"""The fleet emulator: its machinery without training, and what a population costs.

Every figure is of a process of its own, so that one does not carry the memory of another.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from typing import Any

from benchmarks.fleet_training import real_training
from benchmarks.harness import ROOT, Report, arguments, reporting
from benchmarks.noop_fleet import measure_http

_POPULATION = 1_000_000
_COHORT = 1000  #: of that population
_DAY_S = 86400.0


def _measured(report: Report, **settings: object) -> dict[str, Any]:
    """`benchmarks.noop_fleet.measure` in a process of its own."""
    program = (
        "import json, sys; from benchmarks.noop_fleet import measure; "
        "print(json.dumps(measure(**json.loads(sys.argv[1]))))"
    )
    command = (sys.executable, "-c", program, json.dumps(settings))
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    line: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    report.line(**line)
    return line


def noop(report: Report, *, quick: bool, seed: int) -> dict[str, object]:
    """Device-rounds a second of the bare machinery, and the memory it takes."""
    figures: dict[str, object] = {}
    largest_mb = 0.0
    for devices in (100, 1000, 10_000):
        rounds = max(2, (2000 if quick else 40_000) // devices)
        line = _measured(report, devices=devices, cohort=devices, rounds=rounds, seed=seed)
        figures[f"noop_device_rounds_per_s_{devices}"] = line["device_rounds_per_s"]
        largest_mb = max(largest_mb, line["resident_mb"])
    figures["noop_rss_mb"] = largest_mb
    for machinery in ("framed", "sqlite"):
        line = _measured(report, devices=1000, cohort=1000, rounds=2, machinery=machinery, seed=seed)
        figures[f"noop_device_rounds_per_s_1000_{machinery}"] = line["device_rounds_per_s"]
    line = asyncio.run(measure_http(devices=100, rounds=2 if quick else 10, seed=seed))
    report.line(**line)
    figures["noop_device_rounds_per_s_100_http"] = line["device_rounds_per_s"]
    return figures


def population(report: Report, *, quick: bool, seed: int) -> dict[str, object]:
    """What a million devices that come about once a day cost, over the same cohort out of as many devices."""
    rounds = 2 if quick else 10
    same = {"cohort": _COHORT, "rounds": rounds, "seed": seed}
    alone = _measured(report, devices=_COHORT, **same)
    crowd = _measured(report, devices=_POPULATION, visit_every_s=_DAY_S, **same)
    return {
        "population_1e6_extra_mb": round(crowd["resident_mb"] - alone["resident_mb"], 1),
        "population_1e6_device_rounds_per_s": crowd["device_rounds_per_s"],
    }


_PARTS = {"noop": noop, "population": population, "training": real_training}


def main() -> None:
    parser = arguments("fleet", "The fleet emulator.")
    parser.add_argument("--only", action="append", choices=_PARTS, help="one part; may be repeated")
    args = parser.parse_args()
    figures: dict[str, object] = {}
    with reporting("fleet", args.out) as report:
        for name, part in _PARTS.items():
            if name in (args.only or _PARTS):
                figures |= part(report, quick=args.quick, seed=args.seed)
        report.summary(
            figures,
            {
                "noop_device_rounds_per_s": "at least 10,000 at each size",
                "noop_rss_mb": "at most 150",
                "population_1e6_extra_mb": "at most 300",
                "batched_over_sequential": "device-steps/s of all devices in one pass over one by one",
                "share_of_matmul_peak": "of the best of torch, numpy and ONNX Runtime; aim: at least 0.6",
            },
        )


if __name__ == "__main__":
    main()
