"""The sum of a round: read its updates in ledger order, fold them, store the new factors."""

from __future__ import annotations

from collections.abc import Iterator

from aggregator.lifecycle import Fold, Lifecycle
from fedtt.adapter import LiveSet
from fedtt.algorithms import Contribution
from fedtt.codec import CodecSpec, decode_delta
from fedtt.wire import decode_theta, encode_theta
from storage.blobs import BlobStore, load, save
from storage.records import Round, Update, UpdateState
from storage.store import Store

__all__ = ["sum_round"]


class _Tally:
    """What a fold reports beside its factors, gathered while the updates stream by."""

    def __init__(self) -> None:
        self.leases: list[str] = []
        self.examples = 0
        self.loss_first = self.loss_last = 0.0

    def contributions(
        self, updates: Iterator[Update], codec: CodecSpec, live: LiveSet
    ) -> Iterator[Contribution]:
        for update in updates:
            self.leases.append(update.lease_id)
            self.examples += update.examples
            self.loss_first += update.loss_first
            self.loss_last += update.loss_last
            yield Contribution(delta=decode_delta(codec, live, update.payload), examples=update.examples)


def sum_round(store: Store, blobs: BlobStore, lifecycle: Lifecycle, round_: Round) -> Fold:
    """Compute and store version n+1 of a claimed round; the same ledger gives the same bits.

    Runs outside any writing transaction and holds one update at a time.
    """
    tally = _Tally()
    with store.reading() as tx:
        task = tx.task_by_id(round_.task_id)
        base = tx.version(round_.task_id, round_.branch, round_.version_number)
        assert task is not None and base is not None  # noqa: S101, PT018  # foreign keys of a round
        layout = lifecycle.layout(tx, task)
        live = LiveSet(layout, round_.live)
        theta = decode_theta(load(blobs, base.sha256), layout, base.sha256)
        accepted = tx.updates(round_.task_id, round_.branch, round_.number, UpdateState.ACCEPTED)
        contributions = tally.contributions(accepted, task.spec.codec, live)
        folded = task.spec.method.server_step(theta, live, contributions)
    count = max(1, len(tally.leases))
    return Fold(
        task_id=round_.task_id,
        round_number=round_.number,
        sha256=save(blobs, encode_theta(folded)),
        updates=tuple(tally.leases),
        examples=tally.examples,
        loss_first=tally.loss_first / count,
        loss_last=tally.loss_last / count,
    )
