"""What people may ask of a task's versions: to see, download, judge, release, hold and bring them back."""

from __future__ import annotations

import msgspec
from safetensors.numpy import save

from aggregator.answers import VersionRow, as_row
from aggregator.people import audited
from aggregator.problems import malformed, not_found, unknown_task
from aggregator.service import Service
from fedtt.errors import ConfigError
from fedtt.manifest import Manifest
from fedtt.messages import Problem, Verdict
from fedtt.version_config import CONFIG, FACTORS, encode_config, version_config
from fedtt.wire import decode_theta
from storage.blobs import load as load_blob
from storage.records import MAIN, Task, Version
from storage.store import Transaction

__all__ = ["change_version", "judge_version", "list_versions", "version_files"]


async def list_versions(service: Service, name: str) -> list[VersionRow] | Problem:
    """The versions of the model, oldest first; those of other ranks and of groups are the server's own."""

    def look(tx: Transaction) -> list[VersionRow] | Problem:
        task = tx.task(name)
        if task is None:
            return unknown_task(name)
        return [as_row(VersionRow, version) for version in tx.versions(task.id) if version.branch == MAIN]

    return await service.read(look)


async def change_version(service: Service, name: str, number: int, change: str) -> VersionRow | Problem:
    """Release or hold a candidate, or publish an old version again; what it has become."""
    lifecycle, now = service.lifecycle, service.clock.now()

    def apply(tx: Transaction) -> Version | Problem:
        match change:
            case "release":
                return lifecycle.release(tx, now, name, number)
            case "hold":
                return lifecycle.hold(tx, now, name, number, "an operator held it")
            case _:
                return lifecycle.roll_back(tx, now, name, number)

    with service.tracer.span(change) as span:
        span.set({"fedtt.version": number})
        return _version_row(await audited(service, f"version.{change}", name, apply, number=number))


async def judge_version(service: Service, name: str, number: int, body: bytes) -> VersionRow | Problem:
    """Release or hold a candidate by a verdict that people bring."""
    try:
        verdict = msgspec.json.decode(body, type=Verdict)
    except (msgspec.DecodeError, UnicodeDecodeError, ConfigError) as error:
        return malformed(str(error))
    now = service.clock.now()
    version = await audited(
        service,
        "version.judge",
        name,
        lambda tx: service.lifecycle.judge(tx, now, name, number, verdict),
        number=number,
        verdict=verdict,
    )
    if not isinstance(version, Problem):
        service.metrics.versions_decided.labels(version.state.value).inc()
    return _version_row(version)


def _version_row(answer: Version | Problem) -> VersionRow | Problem:
    return answer if isinstance(answer, Problem) else as_row(VersionRow, answer)


async def version_files(service: Service, name: str, number: int) -> dict[str, bytes] | Problem:
    """A version as people download it: safetensors by factor name, and a config that says what it is."""

    def look(tx: Transaction) -> tuple[Task, Version, Manifest] | Problem:
        task = tx.task(name)
        version = tx.version(task.id, MAIN, number) if task else None
        if task is None or version is None:
            return not_found(f"version {number} of task {name[:100]!r}")
        return task, version, service.lifecycle.manifest(tx, task)

    found = await service.read(look)
    if isinstance(found, Problem):
        return found
    task, version, manifest = found
    layout = manifest.adapter.layout
    theta = decode_theta(
        await service.beside_blobs(load_blob, service.blobs, version.sha256), layout, version.sha256
    )
    config = version_config(manifest, task.bundle, task.spec.name, number, version.sha256)
    metadata = {"format": "fedtt", "task": name, "version": str(number), "sha256": version.sha256}
    return {CONFIG: encode_config(config), FACTORS: save(layout.unflatten(theta), metadata=metadata)}
