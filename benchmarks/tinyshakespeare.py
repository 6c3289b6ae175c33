"""Next-token loss of the stories260k decoder on tinyshakespeare: users are the speakers.

Real server, real clients. Judged on speakers no device stands for (test_unseen_users.jsonl.gz).
"""

from __future__ import annotations

import gzip
import json
from collections import defaultdict
from pathlib import Path

from benchmarks.federated import exported, federated
from benchmarks.harness import arguments, reporting, shared_data
from edge_client.examples import Example

TASK = """
name = "tinyshakespeare"
seed = {seed}

[rounds]
count = {rounds}
cohort = 10
quorum = 8
deadline_s = 600
retry_s = 3

[training]
learning_rate = 1e-2
local_steps = 10
batch_size = 16

[method]
name = "fedtt"

[codec]
quantise = "int4"
error_feedback = true
"""
_LEAST_ROWS = 8  #: speakers with fewer lines get no device


def lines(path: Path) -> list[tuple[str, Example]]:
    """Speaker and text of every row."""
    with gzip.open(path, "rt") as file:
        return [(row["user"], Example(row["text"])) for row in map(json.loads, file)]


def main() -> None:
    parser = arguments("tinyshakespeare", "Federated next-token training on tinyshakespeare.")
    parser.add_argument("--rounds", type=int, default=20)
    args = parser.parse_args()
    data, model = shared_data("data/tinyshakespeare"), shared_data("models/stories260k")
    by_speaker: dict[str, list[Example]] = defaultdict(list)
    for speaker, example in lines(data / "train.jsonl.gz"):
        by_speaker[speaker].append(example)
    shards = [rows for _, rows in sorted(by_speaker.items()) if len(rows) >= _LEAST_ROWS]
    test = [example for _, example in lines(data / "test_unseen_users.jsonl.gz")]
    options = ("--task", "causal-lm", "--max-tokens", "128", "--bottleneck", "32")
    bundle = exported("stories260k", str(model), *options)
    rounds = 2 if args.quick else args.rounds
    with reporting("tinyshakespeare", args.out) as report:
        figures = federated(
            report,
            name="tinyshakespeare",
            bundle=bundle,
            task_text=TASK.format(seed=args.seed, rounds=rounds),
            shards=shards,
            test=test[:100] if args.quick else test,
            rounds=rounds,
            judge_every=5,
        )
        against = {"loss_nats": "mean next-token loss on unseen speakers; round 0 is the untrained model"}
        report.summary({"devices": len(shards), **figures}, against)


if __name__ == "__main__":
    main()
