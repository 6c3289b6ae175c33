"""Records with sensible values, and a ledger with one open round, for tests of stores."""

from __future__ import annotations

import hashlib
from typing import Any

from msgspec.structs import replace

from fedtt.task import RoundSpec, TaskSpec
from storage.records import (
    MAIN,
    AdminToken,
    Bundle,
    Device,
    DeviceState,
    Evaluation,
    EvaluationState,
    Group,
    Lease,
    LeaseState,
    Participation,
    Role,
    Round,
    RoundState,
    Task,
    TaskState,
    Token,
    Update,
    UpdateState,
    Version,
    VersionState,
)
from storage.store import Transaction

__all__ = [
    "admin_token",
    "bundle",
    "device",
    "evaluation",
    "group",
    "lease",
    "open_round",
    "participation",
    "round_",
    "sha256",
    "task",
    "token",
    "update",
    "upload",
    "version",
]


def sha256(name: object) -> str:
    return hashlib.sha256(str(name).encode()).hexdigest()


def token(name: object = "secret", **changes: Any) -> Token:
    return replace(Token(sha256=sha256(name), uses_left=5, expires_at=None), **changes)


def device(name: object = "alice", **changes: Any) -> Device:
    plain = Device(
        id=sha256(name)[:32],
        public_key=bytes.fromhex(sha256(name)),
        client="test 1",
        runtimes=("onnxruntime", "torch"),
        examples=7,
        enrolled_at=100.25,
        seen_at=200.5,
        state=DeviceState.ACTIVE,
    )
    return replace(plain, **changes)


def admin_token(name: str = "alice", **changes: Any) -> AdminToken:
    return replace(AdminToken(sha256=sha256(name), name=name, role=Role.ADMIN, created_at=80.0), **changes)


def bundle(name: object = "bundle", **changes: Any) -> Bundle:
    return replace(Bundle(sha256=sha256(name), manifest=b"{}", added_at=90.0), **changes)


def task(name: str = "intents", **changes: Any) -> Task:
    plain = Task(
        id=0,
        spec=TaskSpec(name=name, rounds=RoundSpec(count=3, cohort=10, quorum=2)),
        bundle=bundle().sha256,
        state=TaskState.ACTIVE,
        reason="",
        created_at=95.0,
        resumed_after=0,
        draw_key="0123456789abcdef" * 2,
    )
    return replace(plain, **changes)


def group(number: int = 1, **changes: Any) -> Group:
    plain = Group(
        number=number, version_number=0, frequency=2, depth=1, cohort=5, buffer=4, quorum=1, round_s=60.5
    )
    return replace(plain, **changes)


def version(number: int = 0, **changes: Any) -> Version:
    plain = Version(
        task_id=1,
        branch=MAIN,
        number=number,
        sha256=sha256(f"version {number}"),
        parents=(sha256(f"version {number - 1}"),) if number else (),
        gauge="plain",
        state=VersionState.RELEASED,
        created_at=96.0 + number,
        round_number=number or None,
        updates=4 * number,
        examples=28 * number,
        loss_first=1.5 if number else None,
        loss_last=0.5 if number else None,
    )
    return replace(plain, **changes)


def evaluation(device_name: object = "alice", **changes: Any) -> Evaluation:
    plain = Evaluation(
        lease_id=sha256(f"question to {device_name}")[:32],
        task_id=1,
        branch=MAIN,
        version_number=0,
        device_id=device(device_name).id,
        granted_at=100.5,
        expires_at=200.25,
        state=EvaluationState.ACTIVE,
    )
    return replace(plain, **changes)


def round_(number: int = 1, **changes: Any) -> Round:
    plain = Round(
        task_id=1,
        branch=MAIN,
        number=number,
        version_number=0,
        live=(0, 2, 3),
        invited=(device("alice").id, device("bob").id),
        state=RoundState.OPEN,
        opened_at=300.0,
        deadline_at=None,
        closed_at=None,
        reason="",
    )
    return replace(plain, **changes)


def lease(name: object = "lease", **changes: Any) -> Lease:
    plain = Lease(
        id=sha256(name)[:32],
        task_id=1,
        branch=MAIN,
        round_number=1,
        version_number=0,
        device_id=device("alice").id,
        granted_at=310.0,
        expires_at=910.0,
        state=LeaseState.ACTIVE,
    )
    return replace(plain, **changes)


def update(name: object = "lease", **changes: Any) -> Update:
    """The update under the lease of this name."""
    plain = Update(
        sequence=0,
        lease_id=lease(name).id,
        task_id=1,
        branch=MAIN,
        round_number=1,
        version_number=0,
        device_id=device("alice").id,
        digest=sha256(f"frame of {name}"),
        received_at=320.0,
        examples=7,
        loss_first=1.25,
        loss_last=0.75,
        state=UpdateState.ACCEPTED,
        reason="",
        folded_into=None,
    )
    return replace(plain, **changes)


def participation(name: object = "alice", **changes: Any) -> Participation:
    """Of the device of this name."""
    plain = Participation(
        task_id=1, device_id=device(name).id, count=3, last_round=2, last_loss=1.25, duration_s=12.5
    )
    return replace(plain, **changes)


def open_round(tx: Transaction, devices: tuple[str, ...] = ("alice", "bob")) -> None:
    """Task 1 with version 0 and round 1 open, and these devices."""
    for name in devices:
        tx.put_device(device(name))
    tx.put_bundle(bundle())
    tx.add_task(task())
    tx.add_version(version(0))
    tx.put_round(round_(1))


def upload(
    tx: Transaction, name: object = "lease", *, payload: bytes | None = None, **changes: Any
) -> Update:
    """A lease of this name and the update under it."""
    held = f"payload of {name}".encode() if payload is None else payload
    shared = {key: changes[key] for key in ("device_id", "round_number") if key in changes}
    tx.put_lease(lease(name, state=LeaseState.UPLOADED, **shared))
    return tx.add_update(update(name, **changes), held)
