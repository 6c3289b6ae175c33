"""What clients sent, trained again by one that nobody kills, from the version and residual of each."""

from __future__ import annotations

import hashlib
import sqlite3
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

from msgspec.structs import replace

from benchmarks.faults.client_lives import Lives
from edge_client.activations import FileActivations
from edge_client.bundle import Bundle, open_bundle
from edge_client.examples import ExampleStore, Shard
from edge_client.onnx_runtime import OnnxRuntime
from edge_client.tokens import Tokens
from edge_client.trainer import LocalUpdate, TrainingRequest, train
from fedtt.messages import Plan
from storage.blobs import FileBlobs, load

__all__ = ["trained_again"]

_ACTIVATIONS_BYTES = 256 << 20
_UPDATES = """
SELECT u.round_number, u.version_number, v.sha256, u.digest
FROM updates u JOIN versions v ON (v.task_id, v.branch, v.number) = (u.task_id, u.branch, u.version_number)
WHERE u.device_id = ? ORDER BY u.sequence
"""


def trained_again(devices: Sequence[Lives], data: Path, bundle: Path, activations: Path) -> dict[str, int]:
    """Figures: how many acknowledged frames are others than they should be.

    data: of a server that has ended. activations: where this keeps its own.
    """
    opened = open_bundle(bundle)
    plan = next(lives.plan for lives in devices if lives.plan)
    again = _Again(opened, plan, FileBlobs(data / "blobs"), FileActivations(activations, _ACTIVATIONS_BYTES))
    unlike = shown = count = 0
    with closing(sqlite3.connect(f"file:{data / 'fedtt.db'}?mode=rw", uri=True)) as db:
        for lives in devices:
            state, residual = lives.state, b""
            with closing(ExampleStore(lives.home.examples)) as store:
                examples = Shard(store.read())
            for number, (*place, digest) in enumerate(db.execute(_UPDATES, (state.device,))):
                update = again.train(state.device, examples, residual, *place)
                unlike += hashlib.sha256(update.frame).hexdigest() != digest
                count += 1
                if number == 1:  # the first that carries one
                    shown += again.train(state.device, examples, b"", *place).frame != update.frame
                residual = update.residual
            (kept,) = [found.data for found in state.residuals.values()] or [b""]
            unlike += kept != residual
    return {
        "frames_trained_again": count,
        "frames_unlike_those_of_an_undisturbed_client": unlike,
        "frames_that_show_their_residual": shown,
    }


class _Again:
    """Trainings of one task, outside any client."""

    def __init__(self, bundle: Bundle, plan: Plan, blobs: FileBlobs, activations: FileActivations) -> None:
        self._bundle, self._plan, self._blobs, self._activations = bundle, plan, blobs, activations
        self._runtime, self._tokens = OnnxRuntime(bundle), Tokens(bundle, plan.training.max_tokens)

    def train(
        self,
        device: str,
        examples: Shard,
        residual: bytes,
        round_number: int,
        version_number: int,
        version: str,
    ) -> LocalUpdate:
        plan = replace(self._plan, round=round_number, version_number=version_number, version=version)
        request = TrainingRequest(
            plan=plan,
            device=device,
            bundle=self._bundle,
            version=load(self._blobs, version),
            examples=examples,
            residual=residual,
            activations=self._activations,
        )
        return train(request, self._tokens, self._runtime)
