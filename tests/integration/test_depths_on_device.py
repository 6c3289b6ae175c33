"""A device that trains the last block over kept activations, on real graphs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from msgspec.structs import replace

from edge_client.activations import FileActivations
from edge_client.bundle import Bundle, open_bundle
from edge_client.examples import Shard
from edge_client.onnx_runtime import OnnxRuntime
from edge_client.tokens import Tokens
from edge_client.trainer import LocalUpdate, TrainingRequest, train
from fedtt.adapter import initial_theta
from fedtt.algorithms import FedTT
from fedtt.codec import CodecSpec, decode_delta
from fedtt.layout import Theta
from fedtt.messages import Plan
from fedtt.optimiser import TrainingSpec
from fedtt.wire import decode_update, encode_theta, version_digest
from tests.support.models import WORDS
from tests.support.requests import some_examples

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def bundle(tiny_bundle: Path) -> Bundle:
    return open_bundle(tiny_bundle)


def request(
    bundle: Bundle, activations: FileActivations | None = None, round_number: int = 1
) -> TrainingRequest:
    """Plain SGD on the last block and the head, from factors that all have a gradient."""
    adapter = bundle.manifest.adapter
    theta = initial_theta(adapter, 0)
    theta += np.random.default_rng(0).normal(0, 0.05, theta.shape).astype(np.float32)
    version = encode_theta(theta)
    plan = Plan(
        task="t",
        seed=1,
        bundle=bundle.digest,
        version=version_digest(version),
        version_number=0,
        round=1,
        live=adapter.live_at(1, adapter.layout.everything).indices,
        training=TrainingSpec(optimiser="sgd", momentum=0.0, learning_rate=0.01, local_steps=6, batch_size=4),
        codec=CodecSpec(quantise="fp32"),
        method=FedTT(),
        min_examples=1,
    )
    examples = Shard(some_examples(bundle, WORDS, 12, seed=0))
    return TrainingRequest(
        plan=plan, device="a" * 32, bundle=bundle, version=version, examples=examples, activations=activations
    )


def delta(bundle: Bundle, update: LocalUpdate) -> Theta:
    adapter = bundle.manifest.adapter
    _, payload = decode_update(update.frame)
    return decode_delta(CodecSpec(quantise="fp32"), adapter.live_at(1, adapter.layout.everything), payload)


def test_kept_activations_give_the_bytes_that_fresh_ones_do_and_are_reused(
    bundle: Bundle, tmp_path: Path
) -> None:
    tokens, runtime = Tokens(bundle), OnnxRuntime(bundle)
    kept = FileActivations(tmp_path / "kept", 1 << 20)
    fresh = train(request(bundle), tokens, runtime)
    first = train(request(bundle, kept), tokens, runtime)
    again = train(request(bundle, kept), tokens, runtime)
    assert fresh.frame == first.frame == again.frame
    assert (first.depth, first.prefixes_computed + first.prefixes_reused) == (1, 24)  # 6 batches of 4
    assert first.prefixes_computed <= 12
    assert (again.prefixes_computed, again.prefixes_reused) == (0, 24)
    for path in (tmp_path / "kept").iterdir():
        path.write_bytes(path.read_bytes()[:-1] + b"?")
    damaged = train(request(bundle, FileActivations(tmp_path / "kept", 1 << 20)), tokens, runtime)
    assert damaged.frame == first.frame
    assert damaged.prefixes_computed == first.prefixes_computed


def test_float16_activations_move_the_update_by_less_than_three_in_a_thousand(bundle: Bundle) -> None:
    whole = replace(bundle.manifest.graphs["onnxruntime"], depths=())
    plain = Bundle(
        directory=bundle.directory,
        digest=bundle.digest,
        manifest=replace(bundle.manifest, graphs={"onnxruntime": whole}),
    )
    tokens = Tokens(bundle)
    exact = train(request(plain), tokens, OnnxRuntime(plain))
    rounded = train(request(bundle), tokens, OnnxRuntime(bundle))
    assert (exact.depth, rounded.depth) == (None, 1)
    expected, found = delta(bundle, exact), delta(bundle, rounded)
    assert np.linalg.norm(found - expected) <= 3e-3 * np.linalg.norm(expected)
