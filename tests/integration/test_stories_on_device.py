"""A real decoder on the device: training by next tokens, and continuing a text."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from edge_client.bundle import open_bundle
from edge_client.examples import Example, Shard
from edge_client.executorch_runtime import ExecutorchRuntime
from edge_client.inference import Model
from edge_client.onnx_runtime import OnnxRuntime
from edge_client.tokens import Tokens
from edge_client.trainer import TrainingRequest, train
from export import verify_bundle
from fedtt.adapter import initial_theta
from fedtt.algorithms import FedTT
from fedtt.codec import CodecSpec, decode_delta
from fedtt.messages import Plan
from fedtt.optimiser import TrainingSpec
from fedtt.wire import decode_update, encode_theta, version_digest
from tests.support.models import STORIES

pytestmark = pytest.mark.slow

TEXTS = ["Once upon a time there was a little dog.", "Lily went to the park with her mom.", "x"]


def test_the_loss_it_trains_by_is_the_loss_it_reports(stories_bundle: Path) -> None:
    bundle = open_bundle(stories_bundle)
    runtime = OnnxRuntime(bundle)
    theta = initial_theta(bundle.manifest.adapter, 0)
    theta += np.random.default_rng(0).normal(0, 0.05, theta.shape).astype(np.float32)
    batch, _ = Tokens(bundle).batch(TEXTS)
    assert len({row.sum() for row in batch.mask}) == 3, "rows of different lengths, so that padding counts"
    found = Model(bundle, theta, runtime).evaluate([Example(text) for text in TEXTS])
    assert found.loss == pytest.approx(runtime.gradient(theta, batch)[0], rel=1e-5)
    assert found.accuracy is None


def test_executorch_computes_the_same_step_of_a_decoder(
    stories_executorch_bundle: Path, executorch_library: Path
) -> None:
    """Also where rows are of different lengths; `fedtt verify` compares other shapes with torch."""
    bundle = open_bundle(stories_executorch_bundle, "executorch")
    theirs = ExecutorchRuntime(bundle, library=executorch_library)
    ours = OnnxRuntime(open_bundle(stories_executorch_bundle))
    theta = initial_theta(bundle.manifest.adapter, 0)
    theta += np.random.default_rng(0).normal(0, 0.05, theta.shape).astype(np.float32)
    batch, _ = Tokens(bundle).batch(TEXTS)
    (loss, gradient), (expected_loss, expected) = (r.gradient(theta, batch) for r in (theirs, ours))
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    assert np.linalg.norm(gradient - expected) <= 1e-5 * np.linalg.norm(expected)
    differences = verify_bundle(stories_executorch_bundle, str(STORIES))
    assert {difference.runtime for difference in differences} == {"onnxruntime", "executorch"}


def test_local_training_lowers_the_loss_of_what_it_was_trained_on(stories_bundle: Path) -> None:
    bundle = open_bundle(stories_bundle)
    layout = bundle.manifest.adapter.layout
    runtime, theta = OnnxRuntime(bundle), initial_theta(bundle.manifest.adapter, 0)
    examples = [Example(text) for text in TEXTS]
    plan = Plan(
        task="t",
        seed=0,
        bundle=bundle.digest,
        version=version_digest(encode_theta(theta)),
        version_number=0,
        round=1,
        live=layout.everything.indices,
        training=TrainingSpec(local_steps=15, batch_size=3, learning_rate=1e-2),
        codec=CodecSpec(quantise="int8"),
        method=FedTT(),
        min_examples=1,
    )
    request = TrainingRequest(
        plan=plan,
        device="0" * 32,
        bundle=bundle,
        version=encode_theta(theta),
        examples=Shard(examples),
    )
    update = train(request, Tokens(bundle), runtime)
    _, payload = decode_update(update.frame)
    trained = theta + decode_delta(plan.codec, layout.everything, payload)
    before, after = (Model(bundle, t, runtime).evaluate(examples).loss for t in (theta, trained))
    assert after < before - 0.05


def test_a_continuation_is_the_most_likely_one(stories_bundle: Path) -> None:
    bundle = open_bundle(stories_bundle)
    model = Model(bundle, initial_theta(bundle.manifest.adapter, 0), OnnxRuntime(bundle))
    text = model.continuation("Once upon a time", 20)
    assert text.startswith("Once upon a time, there was a little girl named Lily")
    longest = bundle.manifest.tokenization.max_tokens
    assert len(Tokens(bundle).batch([model.continuation("Once", 10_000)])[0].ids[0]) <= longest
