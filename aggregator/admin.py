"""What people may ask of the server: bundles, tasks, rounds and devices."""

from __future__ import annotations

from collections import Counter

import numpy as np

from aggregator.answers import (
    DeviceRow,
    GroupRow,
    RoundRow,
    SentBundle,
    TaskDetail,
    TaskRow,
    as_row,
)
from aggregator.grouping import waiting_updates
from aggregator.people import audited
from aggregator.problems import conflict_name, conflict_state, malformed, not_found, unknown_task
from aggregator.service import Service
from fedtt.errors import BundleError, ConfigError, LayoutError, WireError
from fedtt.factor_file import decode_factors
from fedtt.manifest import Manifest, bundle_digest, decode_manifest
from fedtt.messages import Problem, UpdateState
from fedtt.server_optimiser import published
from fedtt.task import TaskSpec, parse_task
from fedtt.wire import encode_theta
from storage.blobs import BlobStore
from storage.blobs import load as load_blob
from storage.blobs import save as save_blob
from storage.records import MAIN, Bundle, Round, Task, TaskState
from storage.store import Transaction

__all__ = [
    "add_bundle",
    "change_task",
    "create_task",
    "list_devices",
    "list_rounds",
    "list_tasks",
    "note_blob",
    "open_task",
    "show_task",
]


async def note_blob(service: Service, sha256: str, size_bytes: int) -> None:
    """Log that a file was sent, which nothing deletes."""
    await audited(service, "blob.add", sha256, lambda _: None, bytes=size_bytes)


async def add_bundle(service: Service, manifest_bytes: bytes) -> SentBundle | Problem:
    """Register a bundle whose files have all been sent."""
    try:
        manifest = decode_manifest(manifest_bytes)
    except BundleError as error:
        return malformed(str(error))
    if service.server_key is not None and not service.server_key.has_signed(manifest_bytes):
        key = service.server_key.release_key.hex()
        return malformed(
            f"the bundle is not signed by the release key of this server, {key}: run `fedtt bundle sign`"
        )
    if problem := await service.beside_blobs(_missing_file, service.blobs, manifest):
        return problem
    bundle = Bundle(
        sha256=bundle_digest(manifest_bytes), manifest=manifest_bytes, added_at=service.clock.now()
    )
    answer = await audited(service, "bundle.add", bundle.sha256, lambda tx: tx.put_bundle(bundle))
    return answer if isinstance(answer, Problem) else SentBundle(bundle=bundle.sha256)


def _missing_file(blobs: BlobStore, manifest: Manifest) -> Problem | None:
    for name, entry in manifest.files.items():
        if not blobs.has(entry.sha256) or blobs.size(entry.sha256) != entry.bytes:
            return not_found(
                f"file {name!r} of the bundle (sha256 {entry.sha256[:12]}…, {entry.bytes} bytes)"
            )
    return None


async def create_task(service: Service, text: str, bundle_sha256: str) -> TaskRow | Problem:
    """Read a task file, publish version 0 from its bundle's initial factors, and open it for devices."""
    try:
        spec = parse_task(text)
    except ConfigError as error:
        return malformed(str(error))
    return await open_task(service, spec, bundle_sha256)


async def open_task(service: Service, spec: TaskSpec, bundle_sha256: str) -> TaskRow | Problem:
    """The same for a task that has been read already."""
    bundle = await service.read(lambda tx: tx.bundle(bundle_sha256))
    if bundle is None:
        return not_found(f"bundle {bundle_sha256[:12]}…")
    try:
        first = await service.beside_blobs(_first_versions, service, spec, decode_manifest(bundle.manifest))
    except (BundleError, LayoutError, WireError) as error:
        return malformed(f"the bundle's initial factors cannot be read: {error}")
    except ConfigError as error:
        return malformed(str(error))

    def create(tx: Transaction) -> TaskRow | Problem:
        if tx.task(spec.name) is not None:
            return conflict_name(spec.name)
        now, draw_key = service.clock.now(), service.new_draw_key()
        task = service.lifecycle.create(tx, now, spec, bundle_sha256, *first, draw_key=draw_key)
        return _task_row(tx, task)

    return await audited(service, "task.create", spec.name, create, bundle=bundle_sha256)


def _first_versions(service: Service, spec: TaskSpec, manifest: Manifest) -> tuple[str, dict[int, str]]:
    """Store the bundle's initial factors as theta's canonical bytes, at each of the method's ranks.

    Returns their sha256, and those of the other ranks. Raises ConfigError where the method cannot train them,
    or devices' verdicts would lack what the task goes by.
    """
    spec.check(manifest.adapter)
    if spec.evaluation and spec.evaluation.measure == "accuracy" and manifest.task == "causal-lm":
        raise ConfigError("evaluation.measure", "accuracy", "'loss' with a bundle that predicts tokens")
    data = load_blob(service.blobs, manifest.files[manifest.initial].sha256)
    first = decode_factors(data, manifest.adapter.layout, manifest.initial, "export the bundle again")
    theta = published(spec.server, first)
    if not np.isfinite(theta).all():
        raise LayoutError("a factor is NaN or infinite")
    with np.errstate(over="ignore", invalid="ignore"):
        variants = {rank: spec.method.variant(manifest.adapter, theta, rank) for rank in spec.method.ranks}
    if not all(np.isfinite(variant).all() for variant in variants.values()):
        raise LayoutError("the factors are too large for a variant at a smaller rank")
    stored = {rank: save_blob(service.blobs, encode_theta(at)) for rank, at in variants.items()}
    return save_blob(service.blobs, encode_theta(theta)), stored


def _task_row(tx: Transaction, task: Task) -> TaskRow:
    latest = tx.latest_version(task.id, MAIN)
    round_ = tx.latest_round(task.id, MAIN)
    return TaskRow(
        name=task.spec.name,
        state=task.state,
        reason=task.reason,
        version=latest.number if latest else None,
        of=task.spec.rounds.count,
        round=round_.number if round_ else 0,
        round_state=round_.state if round_ else None,
        updates_in_round=waiting_updates(tx, task),
        loss=latest.loss_last if latest else None,
        bundle=task.bundle,
        created_at=task.created_at,
    )


async def list_tasks(service: Service) -> list[TaskRow]:
    return await service.read(lambda tx: [_task_row(tx, task) for task in tx.tasks()])


async def show_task(service: Service, name: str) -> TaskDetail | Problem:
    def look(tx: Transaction) -> TaskDetail | Problem:
        task = tx.task(name)
        if task is None:
            return unknown_task(name)
        return as_row(TaskDetail, _task_row(tx, task), spec=task.spec, groups=_group_rows(tx, task))

    return await service.read(look)


def _group_rows(tx: Transaction, task: Task) -> list[GroupRow]:
    """The groups in which a task's devices train now, with how many devices each has."""
    sizes = Counter(tx.members(task.id).values()) if task.groups else Counter[int]()
    return [as_row(GroupRow, group, devices=sizes[group.number]) for group in task.groups]


async def change_task(service: Service, name: str, state: TaskState) -> TaskRow | Problem:
    def change(tx: Transaction) -> TaskRow | Problem:
        lifecycle, reason = service.lifecycle, "by an operator"
        if state is TaskState.STOPPED:
            task = lifecycle.stop(tx, service.clock.now(), name, reason)
        else:
            paused = state is TaskState.PAUSED
            task = lifecycle.set_active(tx, service.clock.now(), name, state, reason if paused else "")
        if task is None:
            return unknown_task(name)
        if task.state is not state:
            wanted = "resumed" if state is TaskState.ACTIVE else state.value
            return conflict_state(name, task.state.value, wanted)
        return _task_row(tx, task)

    return await audited(service, "task.change", name, change, state=state)


async def list_rounds(service: Service, name: str, limit: int) -> list[RoundRow] | Problem:
    """The newest rounds, newest first, each with what has become of its updates."""

    def look(tx: Transaction) -> list[RoundRow] | Problem:
        task = tx.task(name)
        if task is None:
            return unknown_task(name)
        return [_round_row(tx, round_) for round_ in tx.rounds(task.id, limit=limit)]

    return await service.read(look)


def _round_row(tx: Transaction, round_: Round) -> RoundRow:
    place = (round_.task_id, round_.branch, round_.number)
    updates = {state: tx.count_updates(*place, state) for state in UpdateState}
    return as_row(RoundRow, round_, invited=len(round_.invited), updates=updates)


async def list_devices(service: Service, after: str) -> list[DeviceRow]:
    return [as_row(DeviceRow, device) for device in await service.read(lambda tx: tx.devices(after=after))]
