"""Training requests of devices that hold different examples of a small bundle."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from edge_client.bundle import Bundle
from edge_client.examples import Example, Shard
from edge_client.trainer import LocalUpdate, TrainingRequest
from fedtt.adapter import initial_theta
from fedtt.algorithms import FedTT, Method
from fedtt.codec import CodecSpec, decode_delta
from fedtt.layout import LiveSet, Theta
from fedtt.messages import Plan
from fedtt.optimiser import TrainingSpec
from fedtt.privacy import PrivacySpec
from fedtt.wire import decode_update, encode_theta, version_digest

__all__ = ["delta_of", "requests_of", "some_examples"]

SGD = TrainingSpec(optimiser="sgd", learning_rate=0.05, local_steps=3, batch_size=4)


def some_examples(bundle: Bundle, words: Sequence[str], count: int, seed: int) -> list[Example]:
    """Texts of 1 to 20 of the words, labelled where the bundle has labels."""
    rng = np.random.default_rng(seed)
    labels = bundle.manifest.labels
    texts = [" ".join(rng.choice(words, rng.integers(1, 21))) for _ in range(count)]
    return [Example(text, int(rng.integers(len(labels))) if labels else None) for text in texts]


def requests_of(
    bundle: Bundle,
    words: Sequence[str],
    counts: Sequence[int],
    *,
    method: Method | None = None,
    training: TrainingSpec = SGD,
    codec: CodecSpec | None = None,
    privacy: PrivacySpec | None = None,
) -> list[TrainingRequest]:
    """One request for each count of examples, from a theta away from the identity."""
    manifest = bundle.manifest
    layout, rng = manifest.adapter.layout, np.random.default_rng(5)
    theta = initial_theta(manifest.adapter, 0)
    theta += rng.normal(0, 0.05, theta.shape).astype(np.float32)
    version = encode_theta(theta)
    plan = Plan(
        task="t",
        seed=1,
        bundle=bundle.digest,
        version=version_digest(version),
        version_number=0,
        round=1,
        live=tuple(range(len(layout.factors))),
        training=training,
        codec=codec or CodecSpec(quantise="fp32"),
        method=method or FedTT(),
        min_examples=1,
        privacy=privacy,
    )
    return [
        TrainingRequest(
            plan=plan,
            device=f"{number:032x}",
            bundle=bundle,
            version=version,
            examples=Shard(some_examples(bundle, words, count, seed=number)),
            noise_key=bytes([number]) * 32 if privacy else b"",
        )
        for number, count in enumerate(counts)
    ]


def delta_of(request: TrainingRequest, update: LocalUpdate) -> Theta:
    """What was sent, as numbers."""
    live = LiveSet(request.bundle.manifest.adapter.layout, request.plan.live)
    return decode_delta(request.plan.codec, live, decode_update(update.frame)[1])
