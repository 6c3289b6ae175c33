"""The bounds of a federation, on a small real model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from edge_client.bundle import open_bundle
from edge_client.examples import Example, Shard
from edge_client.inference import Model
from edge_client.onnx_runtime import OnnxRuntime, onnx_runtimes
from fedtt.algorithms import FedAvg
from fedtt.task import RoundSpec, TaskSpec, TrainingSpec
from fleet.bounds import trained_alone
from fleet.pool import OneByOnePool

pytestmark = pytest.mark.slow

WORDS = {"alarm": "wake me at seven", "lights off": "dark please", "pay": "send ten", "weather": "rain today"}
EXAMPLES = [Example(text, label) for label, text in WORDS.items()]
SPEC = TaskSpec(
    name="bound",
    rounds=RoundSpec(count=1, cohort=1),
    method=FedAvg(),
    training=TrainingSpec(learning_rate=3e-2, batch_size=4),
)


def test_training_in_one_place_learns_all_and_repeats_to_the_bit(tiny_bundle: Path) -> None:
    bundle = open_bundle(tiny_bundle)
    runtime, pool = OnnxRuntime(bundle), OneByOnePool(onnx_runtimes(1))
    first, second = (
        theta for _ in range(2) for theta in trained_alone(bundle, SPEC, [Shard(EXAMPLES)], pool, steps=60)
    )
    assert first.tobytes() == second.tobytes()
    before = Model(bundle, np.zeros_like(first), runtime).evaluate(EXAMPLES)
    after = Model(bundle, first, runtime).evaluate(EXAMPLES)
    assert after.loss < before.loss / 2
    assert after.accuracy == 1.0


def test_a_device_by_itself_learns_what_it_has_seen_and_no_more(tiny_bundle: Path) -> None:
    bundle = open_bundle(tiny_bundle)
    shards, pool = [Shard(EXAMPLES[:2]), Shard(EXAMPLES[2:])], OneByOnePool(onnx_runtimes(1))
    runtime, thetas = OnnxRuntime(bundle), trained_alone(bundle, SPEC, shards, pool, steps=60)
    found = [Model(bundle, theta, runtime).evaluate(EXAMPLES).accuracy for theta in thetas]
    assert found == [0.5, 0.5]
