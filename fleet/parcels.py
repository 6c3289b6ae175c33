"""Trainings and what came of them as bytes: to another process, and to a later one."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
from msgspec import Struct

from edge_client.bundle import Bundle
from edge_client.examples import Example, Shard
from edge_client.trainer import LocalUpdate, TrainingRequest
from fedtt.errors import BundleError, DataError, FedttError, LayoutError, RuntimeFailure, WireError
from fedtt.messages import Plan
from fleet.pool import Handle

__all__ = [
    "Answer",
    "Failed",
    "Updated",
    "answer_of",
    "decode_answers",
    "decode_work",
    "encode_answers",
    "encode_work",
    "update_of",
]

_FAILURES: dict[str, type[FedttError]] = {
    kind.__name__: kind for kind in (BundleError, DataError, LayoutError, RuntimeFailure, WireError)
}


class Failed(Struct, frozen=True, tag="failed"):
    """What a training raised."""

    kind: str
    message: str


class Updated(Struct, frozen=True, tag="update"):
    """What it gave."""

    update: LocalUpdate


Answer = Updated | Failed


def answer_of(handle: Handle) -> Answer:
    """Ask for a result, and take an error of the training itself as one."""
    try:
        return Updated(handle.result())
    except tuple(_FAILURES.values()) as error:
        return Failed(type(error).__name__, str(error))


def update_of(answer: Answer) -> LocalUpdate:
    """The update, or the error raised again."""
    if isinstance(answer, Failed):
        raise _FAILURES[answer.kind](answer.message)
    return answer.update


class _Job(Struct, frozen=True):
    """A request without what it shares with others."""

    plan: int
    device: str
    examples: list[Example]
    residual: bytes
    noise_key: bytes


class _Work(Struct, frozen=True):
    """Requests; plans and versions, which many share, stand in it once."""

    plans: list[Plan]
    versions: list[bytes]  #: the one that each plan begins from
    jobs: list[_Job]


def encode_work(requests: Sequence[TrainingRequest]) -> bytes:
    """The bundle is not in it: it goes by its digest, which each plan names."""
    places: dict[bytes, int] = {}
    plans: list[Plan] = []
    versions: list[bytes] = []
    jobs = []
    for request in requests:
        place = places.setdefault(msgspec.msgpack.encode(request.plan), len(plans))
        if place == len(plans):
            plans.append(request.plan)
            versions.append(request.version)
        jobs.append(
            _Job(place, request.device, list(request.examples.read()), request.residual, request.noise_key)
        )
    return msgspec.msgpack.encode(_Work(plans, versions, jobs))


def decode_work(data: bytes, bundle: Bundle) -> list[TrainingRequest]:
    work = msgspec.msgpack.decode(data, type=_Work)
    return [
        TrainingRequest(
            plan=work.plans[job.plan],
            device=job.device,
            bundle=bundle,
            version=work.versions[job.plan],
            examples=Shard(job.examples),
            residual=job.residual,
            noise_key=job.noise_key,
        )
        for job in work.jobs
    ]


def encode_answers(handles: Sequence[Handle]) -> bytes:
    return msgspec.msgpack.encode([answer_of(handle) for handle in handles])


def decode_answers(data: bytes) -> list[Answer]:
    return msgspec.msgpack.decode(data, type=list[Answer])
