"""What federation is measured against: the same adapters trained in one place, and each device by itself."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np
from msgspec.structs import replace

from edge_client.bundle import Bundle
from edge_client.examples import Examples, Shard
from edge_client.trainer import TrainingRequest
from fedtt.algorithms import FedAvg
from fedtt.codec import CodecSpec, decode_delta
from fedtt.layout import Theta
from fedtt.messages import Plan
from fedtt.task import TaskSpec
from fedtt.wire import decode_update, encode_theta, version_digest
from fleet.experiment import Experiment
from fleet.pool import Pool
from fleet.spec import steps_alone

__all__ = ["Bound", "trained_alone", "trained_bound"]

Bound = Literal["local-only", "centralised"]


def trained_bound(experiment: Experiment, bound: Bound, pool: Pool) -> Iterator[Theta]:
    """The factors (P,) of each shard by itself, or the only ones of all rows in one place, after the steps
    of `steps_alone`, one at least."""
    spec, shards = experiment.spec, list[Examples](experiment.shards)
    if bound == "centralised":
        shards = [Shard([example for shard in shards for example in shard.read()])]
    steps = max(1, steps_alone(spec.task, spec.fleet.devices, bound))
    return trained_alone(experiment.bundle, spec.task, shards, pool, steps=steps)


def trained_alone(
    bundle: Bundle, spec: TaskSpec, shards: Sequence[Examples], pool: Pool, *, steps: int
) -> Iterator[Theta]:
    """The factors (P,) after `steps` optimiser steps by the task's settings on each shard by itself.

    All rows as one shard make it the centralised bound, with as many steps as all devices take together. All
    numbers of the adapters are trained, whatever turns a method has them take, down to `training.depth`;
    nothing pulls back to the start, as FedProx does, and nothing is coded.
    """
    adapter = bundle.manifest.adapter
    depth, everything = spec.training.depth, adapter.layout.everything
    live = everything if depth is None else adapter.live_at(depth, everything)
    start, codec = bundle.first_theta(), CodecSpec(quantise="fp32")
    theta = encode_theta(start)
    plan = Plan(
        task=spec.name,
        seed=spec.seed,
        bundle=bundle.digest,
        version=version_digest(theta),
        version_number=0,
        round=1,
        live=live.indices,
        training=replace(spec.training, local_steps=steps, proximal=0.0),
        codec=codec,
        method=FedAvg(),
        min_examples=1,
    )
    handles = [
        pool.submit(
            TrainingRequest(
                plan=plan,
                device=hashlib.sha256(f"shard {number}".encode()).hexdigest()[:32],
                bundle=bundle,
                version=theta,
                examples=shard,
            )
        )
        for number, shard in enumerate(shards)
    ]
    for handle in handles:
        payload = decode_update(handle.result().frame)[1]
        yield np.asarray(start + live.scatter(decode_delta(codec, live, payload)), np.float32)
