"""One transaction of the SQL store: records in, records out, each method one of `storage.statements`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from msgspec.structs import asdict, replace

from fedtt.errors import StorageError
from storage import statements as sql
from storage.records import (
    Bundle,
    Evaluation,
    Lease,
    LeaseState,
    Payload,
    Round,
    RoundState,
    Task,
    Update,
    UpdateState,
    Version,
)
from storage.sql_devices import SqlDevices

__all__ = ["SqlTransaction"]

_PAGE = 64  #: updates held in memory at once while they are iterated


class SqlTransaction(SqlDevices):
    """Reads and writes on one connection; keeps `storage.store.Transaction`."""

    def put_bundle(self, bundle: Bundle) -> None:
        self._put(sql.bundles, bundle)

    def bundle(self, sha256: str) -> Bundle | None:
        return self._one(sql.bundles, sql.bundles.get, sha256=sha256)

    def add_task(self, task: Task) -> Task:
        task = replace(task, id=self._read(sql.newest_task).scalar_one() + 1)
        if self._write(sql.tasks.add, asdict(task) | {"name": task.spec.name}).rowcount == 0:
            raise StorageError(f"a task named {task.spec.name!r} exists already")
        return task

    def put_task(self, task: Task) -> None:
        self._put(sql.tasks, task, name=task.spec.name)

    def task(self, name: str) -> Task | None:
        return self._one(sql.tasks, sql.task_by_name, name=name)

    def task_by_id(self, task_id: int) -> Task | None:
        return self._one(sql.tasks, sql.tasks.get, id=task_id)

    def tasks(self) -> list[Task]:
        return self._all(sql.tasks, sql.all_tasks)

    def add_version(self, version: Version) -> None:
        if self._write(sql.versions.add, asdict(version)).rowcount == 0:
            raise StorageError(f"version {version.number} of branch {version.branch!r} exists already")

    def put_version(self, version: Version) -> None:
        self._put(sql.versions, version)

    def latest_version(self, task_id: int, branch: str) -> Version | None:
        return self._one(sql.versions, sql.latest_version, task_id=task_id, branch=branch)

    def version(self, task_id: int, branch: str, number: int) -> Version | None:
        return self._one(sql.versions, sql.versions.get, task_id=task_id, branch=branch, number=number)

    def versions(self, task_id: int) -> list[Version]:
        return self._all(sql.versions, sql.versions_of, task_id=task_id)

    def has_version(self, sha256: str) -> bool:
        return self._read(sql.version_named, {"sha256": sha256}).first() is not None

    def put_round(self, round_: Round) -> None:
        self._put(sql.rounds, round_)

    def latest_round(self, task_id: int, branch: str) -> Round | None:
        return self._one(sql.rounds, sql.latest_round, task_id=task_id, branch=branch)

    def round(self, task_id: int, branch: str, number: int) -> Round | None:
        return self._one(sql.rounds, sql.rounds.get, task_id=task_id, branch=branch, number=number)

    def rounds(self, task_id: int, *, limit: int = 1000) -> list[Round]:
        return self._all(sql.rounds, sql.newest_rounds, task_id=task_id, limit=limit)

    def count_rounds(self, task_id: int) -> dict[RoundState, int]:
        return {row.state: row.rounds for row in self._read(sql.count_rounds, {"task_id": task_id})}

    def put_evaluation(self, evaluation: Evaluation) -> None:
        self._put(sql.evaluations, evaluation)

    def evaluation(self, lease_id: str) -> Evaluation | None:
        return self._one(sql.evaluations, sql.evaluations.get, lease_id=lease_id)

    def evaluations(self, task_id: int, branch: str, version_number: int) -> list[Evaluation]:
        place = {"task_id": task_id, "branch": branch, "version_number": version_number}
        return self._all(sql.evaluations, sql.evaluations_of, **place)

    def forget_evaluations(self, device_id: str) -> None:
        self.has_wiped = True
        self._write(sql.forget_evaluations, {"device": device_id})

    def put_lease(self, lease: Lease) -> None:
        if self._batch is not None and self._batch.knows(sql.leases, lease):
            self._refuse_if_reading()
            self._batch.move(lease)
        else:
            self._put(sql.leases, lease)

    def lease(self, lease_id: str) -> Lease | None:
        return self._one(sql.leases, sql.leases.get, id=lease_id)

    def lease_of(self, device_id: str, task_id: int, branch: str, round_number: int) -> Lease | None:
        place = {"task_id": task_id, "branch": branch, "round_number": round_number}
        return self._one(sql.leases, sql.lease_of, device_id=device_id, **place)

    def leases_of(self, device_id: str, state: LeaseState) -> list[Lease]:
        return self._all(sql.leases, sql.leases_of, device_id=device_id, state=state)

    def count_leases(self, task_id: int, branch: str, round_number: int) -> dict[LeaseState, int]:
        place = {"task_id": task_id, "branch": branch, "round_number": round_number}
        return {row.state: row.leases for row in self._read(sql.count_leases, place)}

    def expire_leases(self, now: float) -> int:
        return self._write(sql.expire_leases, {"now": now}).rowcount

    def add_update(self, update: Update, payload: bytes) -> Update:
        if not payload:
            raise StorageError(f"the update under lease {update.lease_id} has no payload")
        update = replace(update, sequence=self._next_update())
        held = Payload(sequence=update.sequence, payload=payload)
        if self._batch is not None and not self._readonly and self.update(update.lease_id) is None:
            self._batch.write(sql.updates, sql.updates.add, update)
            self._batch.write(sql.payloads, sql.payloads.add, held)
        elif self._write(sql.updates.add, asdict(update)).rowcount == 0:
            raise StorageError(f"lease {update.lease_id} has an update already")
        else:
            self._write(sql.payloads.add, asdict(held))
        self._newest_update = update.sequence
        self.moved[update.state] += 1
        return update

    def _next_update(self) -> int:
        """The sequence after the newest: nobody else writes meanwhile, so the ledger has no gaps."""
        if self._newest_update is None:
            self._newest_update = int(self._read(sql.newest_update).scalar_one())
        return self._newest_update + 1

    def update(self, lease_id: str) -> Update | None:
        return self._one(sql.updates, sql.updates.get, lease_id=lease_id)

    def count_updates(self, task_id: int, branch: str, round_number: int, state: UpdateState) -> int:
        place = {"task_id": task_id, "branch": branch, "round_number": round_number, "state": state}
        return int(self._read(sql.count_updates, place).scalar_one())

    def updates(self, task_id: int, branch: str, round_number: int, state: UpdateState) -> Iterator[Update]:
        place = {"task_id": task_id, "branch": branch, "round_number": round_number, "state": state}
        page: list[Update] = []
        while True:
            after = page[-1].sequence if page else 0
            page = self._all(sql.updates, sql.page_of_updates, after=after, limit=_PAGE, **place)
            yield from page
            if len(page) < _PAGE:
                return

    def payloads(self, updates: Sequence[Update]) -> list[bytes]:
        sequences = [update.sequence for update in updates]
        found = {
            row.sequence: row.payload for row in self._all(sql.payloads, sql.payloads_of, sequences=sequences)
        }
        if missing := next((number for number in sequences if number not in found), None):
            raise StorageError(f"update {missing} holds no payload")
        return [found[number] for number in sequences]

    def updates_of(self, device_id: str, state: UpdateState) -> list[Update]:
        return self._all(sql.updates, sql.updates_of, device_id=device_id, state=state)

    def settle(
        self,
        updates: Iterable[str],
        state: UpdateState,
        *,
        reason: str = "",
        folded_into: int | None = None,
    ) -> int:
        end = {"names": list(updates), "state": state, "reason": reason, "folded_into": folded_into}
        moved = self._write(sql.settle, end).rowcount if end["names"] else 0
        self.has_settled |= moved > 0
        self.moved[state] += moved
        return moved

    def wipe(self, *, after: int, limit: int) -> list[int]:
        """Delete the payloads of the first updates behind a sequence that are settled; returns of which."""
        settled = list(self._read(sql.payloads_to_wipe, {"after": after, "limit": limit}).scalars())
        if settled:
            self.has_wiped = True
            self._write(sql.wipe, {"sequences": settled})
        return settled

    def forget_settled(self, device_id: str) -> int:
        self.has_wiped = True
        return self._write(sql.forget_settled, {"device": device_id}).rowcount
