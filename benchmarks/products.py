"""What fewer bits cost in accuracy: one federation on CLINC150, trained and judged by each kind of bundle.

MiniLM-L6, FedTT in the last two blocks, 100 devices with Dirichlet(0.5) label skew, 10 updates a round, one
seed. Devices and judge run the bundle's own graphs in ONNX Runtime, over a base in fp32, in fp16 and in int8
multiplied in fp32, and over one in int8 multiplied in int8, and this once more in ExecuTorch, where it can be
built; all else is the same.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import msgspec

from benchmarks.claims.data import DataSet, prepared
from benchmarks.device import executorch_library
from benchmarks.federated import WORK, exported
from benchmarks.harness import Report, arguments, minilm_directory, reporting
from edge_client.bundle import RuntimeName, open_bundle
from edge_client.executorch_runtime import executorch_runtimes
from edge_client.onnx_runtime import onnx_runtimes
from fedtt.task import read_task
from fleet.experiment import prepare
from fleet.pool import OneByOnePool
from fleet.run import run_fleet
from fleet.run_files import VersionLine
from fleet.spec import FleetFile, FleetSpec

INT8 = ("--base", "int8", "--products", "int8")
ARMS = {
    "fp32": (),
    "fp16": ("--base", "fp16"),
    "int8_base": ("--base", "int8"),
    "int8": INT8,
    "int8_executorch": (*INT8, "--runtime", "onnxruntime,executorch"),
}


def main() -> None:
    parser = arguments(
        "products", "accuracy of a federation over a base in fp32, in fp16, and multiplied in int8"
    )
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    rounds = 1 if args.quick else args.rounds
    data = prepared("clinc150", judged_rows=100 if args.quick else 1500)
    figures: dict[str, float] = {}
    with reporting("products", args.out) as report:
        for products, options in ARMS.items():
            runtime: RuntimeName = "executorch" if products.endswith("executorch") else "onnxruntime"
            if runtime == "executorch" and executorch_library(report) is None:
                continue
            bundle = bundle_of(products, options, data)
            lines = trained(bundle, data, rounds, args.seed, products, runtime=runtime)
            say(report, lines, products=products)
            figures |= {
                f"accuracy_{products}": lines[-1].accuracy or 0.0,
                f"loss_{products}": lines[-1].loss or 0.0,
            }
        report.summary(figures, dict.fromkeys(figures, "accuracy_fp32 and loss_fp32, in the same run"))


def say(report: Report, lines: list[VersionLine], **arm: object) -> None:
    """The versions that were judged."""
    for line in lines:
        if line.loss is not None:
            report.line(**arm, version=line.version, accuracy=line.accuracy, loss=line.loss)


def bundle_of(name: str, options: tuple[str, ...], data: DataSet) -> Path:
    labels = WORK / "clinc150-labels.json"
    labels.parent.mkdir(exist_ok=True)
    labels.write_text(json.dumps({"labels": data.labels}))
    fixed = ("--labels", str(labels), "--depth", "2", "--depths", "2", "--max-tokens", "64", "--no-verify")
    return exported(f"products-{name}", minilm_directory(), *fixed, *options)


def trained(
    bundle: Path,
    data: DataSet,
    rounds: int,
    seed: int,
    name: str,
    *,
    runtime: RuntimeName = "onnxruntime",
    task_parts: Mapping[str, object] = MappingProxyType({}),
) -> list[VersionLine]:
    """The versions of a run, some of them judged; `task_parts` join or replace those of the task."""
    raw: dict[str, Any] = {
        "fleet": {"devices": 100, "seed": seed, "threads": 1},
        "bundle": str(bundle),
        "data": {
            "train": str(data.train),
            "partition": {"kind": "dirichlet", "alpha": 0.5, "least": 16},
        },
        "evaluation": {"data": str(data.test), "every": 5, "per_device": 0},
    }
    parts = msgspec.convert(raw, FleetFile, dec_hook=lambda _, value: Path(value))
    task = read_task(
        {
            "name": "products",
            "seed": seed,
            "rounds": {"count": rounds, "cohort": 10},
            "training": {"learning_rate": 1e-2, "local_steps": 8, "batch_size": 16},
            "method": {"name": "fedtt"},
            "codec": {"quantise": "int4", "error_feedback": True},
        }
        | dict(task_parts),
        "products",
    )
    spec = FleetSpec(task=task, **{field: getattr(parts, field) for field in FleetFile.__struct_fields__})
    lines: list[VersionLine] = []
    directory = WORK / f"products-{name}-run"
    runtimes = executorch_runtimes() if runtime == "executorch" else onnx_runtimes()
    outcome = run_fleet(
        prepare(spec),
        directory,
        fresh=True,
        on_version=lines.append,
        pool=OneByOnePool(runtimes),
        judge=runtimes.open(open_bundle(bundle, runtime)),
    )
    shutil.rmtree(directory)
    if outcome.state != "finished":
        raise RuntimeError(f"the run ended {outcome.state}: {outcome.reason}")
    return lines


if __name__ == "__main__":
    main()
