"""What one training step pays for its rows: for clipping each example's gradient, and for padding.

MiniLM-L6 at full depth, one thread, CPU time. `private` is the step that DP-SGD takes, over the plain one on
8 texts of 64 tokens, in ONNX Runtime and, where its package and a C++ compiler are, ExecuTorch. `passes` are
batches of 16 utterances of the assistant data set as a device trains on them, cut into passes of like length,
over the same batches padded to their longest, in ONNX Runtime.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.device import LABELS, executorch_library
from benchmarks.device_figures import SUFFIX
from benchmarks.device_rows import SHAPES
from benchmarks.harness import ROOT, arguments, minilm_directory, reporting

if TYPE_CHECKING:
    from edge_client.bundle import Bundle, RuntimeName
    from edge_client.runtime import Runtime
    from edge_client.tokens import Batch

ROWS = 16
UTTERANCES = ROOT / "fleet" / "assistant" / "utterances.jsonl"


def main() -> None:
    parser = arguments("rows", "what clipping each example, and padding, cost a training step")
    parser.add_argument("--runtime", default="onnxruntime,executorch", help="what is measured (%(default)s)")
    args = parser.parse_args()
    with reporting("rows", args.out) as report:
        turns = 3 if args.quick else 15
        both = "executorch" in args.runtime.split(",") and executorch_library(report) is not None
        runtimes: list[RuntimeName] = ["onnxruntime", "executorch"] if both else ["onnxruntime"]
        private: dict[str, float] = {}
        for runtime in runtimes:
            private |= private_over_plain(runtime, bundle(runtimes), turns, args.seed)
        padding = passes_over_one_piece(bundle(runtimes), 4 if args.quick else 20, turns, args.seed)
        report.summary(
            private | padding,
            {
                "step_private_over_plain_cpu_*": "<= 1.15: each example's gradient clipped, over the "
                "plain step, 8 x 64 tokens",
                "step_passes_over_one_piece_cpu_onnx": "batches of 16 in passes of like length, over the "
                "same batches padded to their longest",
            },
        )


def bundle(runtimes: list[RuntimeName]) -> Path:
    """With the step that clips; tests compare such with torch."""
    from benchmarks.federated import exported

    options = ("--labels", str(LABELS), "--dp", "--depths", "", "--no-verify")
    name = f"rows-minilm-dp{'-both' if 'executorch' in runtimes else ''}"
    return exported(name, minilm_directory(), *options, "--runtime", ",".join(runtimes))


def runtime_of(name: RuntimeName, opened: Bundle) -> Runtime:
    from edge_client.executorch_runtime import ExecutorchRuntime
    from edge_client.onnx_runtime import OnnxRuntime

    return OnnxRuntime(opened) if name == "onnxruntime" else ExecutorchRuntime(opened)


def private_over_plain(name: RuntimeName, directory: Path, turns: int, seed: int) -> dict[str, float]:
    """Median CPU time of either step, by turns."""
    from edge_client.bundle import open_bundle
    from edge_client.tokens import Batch

    opened, rng = open_bundle(directory, name), np.random.default_rng(seed)
    manifest, runtime = opened.manifest, runtime_of(name, opened)
    theta, live = somewhere(opened, seed), np.ones(manifest.adapter.layout.size, np.float32)
    batch = Batch(
        ids=rng.integers(0, manifest.model.vocabulary, SHAPES[0]),
        mask=np.ones(SHAPES[0], np.int64),
        labels=rng.integers(0, len(manifest.labels), SHAPES[0][0]),
    )
    plain, private = by_turns(
        turns,
        lambda: runtime.gradient(theta, batch),
        lambda: runtime.private_gradient(theta, batch, live, 1.0),
    )
    suffix = SUFFIX[name]
    return {
        f"step_plain_cpu_ms_{suffix}": plain,
        f"step_private_cpu_ms_{suffix}": private,
        f"step_private_over_plain_cpu_{suffix}": private / plain,
    }


def passes_over_one_piece(directory: Path, count: int, turns: int, seed: int) -> dict[str, float]:
    """CPU time of so many batches of shuffled utterances, either way by turns."""
    from edge_client.bundle import open_bundle
    from edge_client.passes import PASSES, in_passes, padded_tokens, plan_passes

    opened = open_bundle(directory)
    runtime, theta = runtime_of("onnxruntime", opened), somewhere(opened, seed)
    least, batches = opened.manifest.tokenization.min_tokens, utterances(opened, count, seed)

    def one_piece() -> None:
        for batch in batches:
            runtime.gradient(theta, batch)

    def passes() -> None:
        for batch in batches:
            in_passes(batch, PASSES, lambda part: runtime.gradient(theta, part), least=least, by_tokens=False)

    whole_ms, passes_ms = by_turns(max(1, turns // 3), one_piece, passes)
    tokens = sum(int(batch.mask.sum()) for batch in batches)
    whole = sum(batch.ids.size for batch in batches)
    cut = sum(padded_tokens(plan_passes(b.mask.sum(1), PASSES, least=least)) for b in batches)
    return {
        "padding_share_one_piece": 1 - tokens / whole,
        "padding_share_passes": 1 - tokens / cut,
        "step_one_piece_cpu_ms_onnx": whole_ms / count,
        "step_passes_cpu_ms_onnx": passes_ms / count,
        "step_passes_over_one_piece_cpu_onnx": passes_ms / whole_ms,
    }


def utterances(opened: Bundle, count: int, seed: int) -> list[Batch]:
    from edge_client.batches import batch_rows
    from edge_client.example_files import read_examples
    from edge_client.tokens import Tokens

    texts = [example.words for example in read_examples(UTTERANCES)]
    rows = batch_rows(len(texts), ROWS, count, np.random.default_rng(seed))
    tokens = Tokens(opened)
    return [tokens.batch([texts[i] for i in batch], [0] * len(batch))[0] for batch in islice(rows, count)]


def somewhere(opened: Bundle, seed: int) -> NDArray[np.float32]:
    """A theta at which every factor has a gradient."""
    from fedtt.adapter import initial_theta

    theta = initial_theta(opened.manifest.adapter, seed)
    return theta + np.random.default_rng(seed).normal(0, 0.05, theta.shape).astype(np.float32)


def by_turns(turns: int, *measured: Callable[[], Any]) -> list[float]:
    """Median CPU milliseconds of each, after one run of each to warm up."""
    found: list[list[float]] = [[] for _ in measured]
    for turn in range(turns + 1):
        for times, run in zip(found, measured, strict=True):
            began = time.process_time()
            run()
            if turn:
                times.append((time.process_time() - began) * 1e3)
    return [statistics.median(times) for times in found]


if __name__ == "__main__":
    main()
