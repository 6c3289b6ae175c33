"""The sum of a round: read its updates in ledger order, fold them, store the new factors.

Of a round that puts groups together: read the factors they have come to, and add up how far that is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import groupby, islice

import numpy as np
from msgspec.structs import replace
from numpy.typing import NDArray

from aggregator.grouping import Grouping, changes_of, form_groups, hierarchical, next_period
from aggregator.lifecycle import Fold, Lifecycle
from aggregator.promised import promised
from fedtt.algorithms.group_fold import GroupChange, merge_groups
from fedtt.codec import decode_deltas
from fedtt.errors import WireError
from fedtt.folds import Contribution, Mean
from fedtt.folds import Fold as UpdateFold
from fedtt.layout import LiveSet, Theta
from fedtt.server_optimiser import ServerSpec, ServerState, decode_state, encode_state, server_update
from fedtt.server_step import Step, server_step
from fedtt.task import TaskSpec
from fedtt.wire import decode_theta, encode_theta
from storage.blobs import BlobStore, load, save
from storage.records import MAIN, Round, Update, UpdateState, Version, rank_branch
from storage.store import Store, Transaction

__all__ = ["server_state", "sum_round"]

_DECODED = 64  #: updates that are decoded together
_OLDER_KEPT = 4  #: factors of versions before the newest, each at one rank
_WEIGHT = "weight"  #: what a version of a group says of the examples behind it


class _Tally:
    """What a fold reports beside its factors, gathered while the updates stream by."""

    def __init__(self) -> None:
        self.leases: list[str] = []
        self.examples = 0
        self.weight = self.loss_first = self.loss_last = 0.0

    def count(self, update: Update) -> None:
        self.leases.append(update.lease_id)
        self.examples += update.examples
        self.loss_first += update.loss_first
        self.loss_last += update.loss_last


class _Bases(Mapping[int | None, Theta]):
    """The factors of a version at each rank, read when a method asks for them."""

    def __init__(self, read: Callable[[int | None], Theta], ranks: tuple[int | None, ...]) -> None:
        self._read, self._ranks = read, ranks

    def __getitem__(self, rank: int | None) -> Theta:
        return self._read(rank)

    def __iter__(self) -> Iterator[int | None]:
        return iter(self._ranks)

    def __len__(self) -> int:
        return len(self._ranks)


class _Round:
    """A claimed round with all that its sum is made from, read in one transaction."""

    def __init__(self, tx: Transaction, blobs: BlobStore, lifecycle: Lifecycle, round_: Round) -> None:
        self._tx, self._blobs, self._round = tx, blobs, round_
        self.task = promised(tx.task_by_id(round_.task_id), "a round's task")
        self.adapter = lifecycle.adapter(tx, self.task)
        self._adapters = {
            rank: lifecycle.adapter(tx, self.task, rank) for rank in self.task.spec.method.ranks
        }
        self._lives = {
            rank: LiveSet(adapter.layout, round_.live)
            for rank, adapter in [(None, self.adapter), *self._adapters.items()]
        }
        self.live = self._lives[None]
        self._read: dict[tuple[int, int | None], Theta] = {}
        self.tally = _Tally()

    @property
    def spec(self) -> TaskSpec:
        """Of its fold: where groups are put together afterwards, the server optimiser has its turn there."""
        return self.task.spec if self._round.branch == MAIN else replace(self.task.spec, server=ServerSpec())

    def bases(self, staleness: int = 0) -> Mapping[int | None, Theta]:
        """rank -> the factors its devices trained from, so many versions ago."""
        return _Bases(partial(self._base, self._round.version_number - staleness), tuple(self._lives))

    def _base(self, number: int, rank: int | None) -> Theta:
        """Those asked for last are kept: each rank's of the newest version, and a few that are older."""
        found = self._read.pop((number, rank), None)
        if found is None:
            while len(self._read) >= len(self._lives) + _OLDER_KEPT:
                del self._read[next(iter(self._read))]
            branch = self._round.branch if rank is None else rank_branch(rank)
            base = promised(self._tx.version(self._round.task_id, branch, number), "a round's version")
            found = decode_theta(load(self._blobs, base.sha256), self._lives[rank].layout, base.sha256)
        self._read[number, rank] = found
        return found

    def state(self) -> ServerState | None:
        """What the fold before left for this one."""
        found = self._tx.version(self._round.task_id, self._round.branch, self._round.version_number)
        return server_state(self._blobs, promised(found, "a round's version"))

    def contributions(self) -> Iterator[Contribution]:
        codec, number = self.task.spec.codec, self._round.version_number
        place = (self._round.task_id, self._round.branch, self._round.number)
        updates = self._tx.updates(*place, UpdateState.ACCEPTED)
        while few := list(islice(updates, _DECODED)):
            held = zip(few, self._tx.payloads(few), strict=True)
            for rank, some in groupby(held, key=lambda pair: pair[0].rank):
                alike, payloads = zip(*some, strict=True)
                deltas = decode_deltas(codec, self._lives[rank], payloads)
                for update, delta in zip(alike, deltas, strict=True):
                    yield self._contribution(update, delta, number - update.version_number)

    def _contribution(self, update: Update, delta: NDArray[np.float32], staleness: int) -> Contribution:
        self.tally.count(update)
        contribution = Contribution(
            delta=delta,
            examples=update.examples,
            staleness=staleness,
            rank=update.rank,
            bases=self.bases(staleness) if staleness else None,
        )
        self.tally.weight += _weight(self.task.spec.fold, contribution)
        return contribution


def _weight(fold: UpdateFold, contribution: Contribution) -> float:
    """What an update counts towards the weight of its group; one where the fold counts all alike."""
    return fold.weight(contribution) if isinstance(fold, Mean) else 1.0


def server_state(blobs: BlobStore, version: Version) -> ServerState | None:
    """What the fold that made a version left for the next one."""
    return decode_state(load(blobs, version.server_state)) if version.server_state else None


def sum_round(store: Store, blobs: BlobStore, lifecycle: Lifecycle, round_: Round) -> Fold:
    """Compute and store version n+1 of a claimed round; the same ledger gives the same bits.

    Runs outside any writing transaction; where the fold is a sum it holds a few updates at a time. Raises
    WireError where the sum is not finite: each update is, and one of a hostile device may still be as large
    as a float can be.
    """
    with store.reading() as tx:
        found = _Round(tx, blobs, lifecycle, round_)
        if round_.branch == MAIN and found.task.groups:
            return _sum_groups(tx, blobs, found, round_)
        bases, contributions = found.bases(), found.contributions()
        step = server_step(found.spec, found.adapter, bases, found.live, contributions, found.state())
        grouping = _first_groups(tx, found, round_, step)
    tally = found.tally
    if not step.is_finite:
        raise WireError(f"the sum of its {len(tally.leases)} updates is not finite")
    count = max(1, len(tally.leases))
    return Fold(
        task_id=round_.task_id,
        branch=round_.branch,
        round_number=round_.number,
        sha256=save(blobs, encode_theta(step.theta)),
        updates=tuple(tally.leases),
        examples=tally.examples,
        loss_first=tally.loss_first / count,
        loss_last=tally.loss_last / count,
        variants={rank: save(blobs, encode_theta(theta)) for rank, theta in step.variants.items()},
        server_state=save(blobs, encode_state(step.state)),
        report=step.report | ({} if round_.branch == MAIN else {_WEIGHT: tally.weight}),
        grouping=grouping,
    )


def _first_groups(tx: Transaction, found: _Round, round_: Round, step: Step) -> Grouping | None:
    """The groups that begin once the warm-up is over."""
    method = hierarchical(found.task)
    if method is None or round_.branch != MAIN or round_.version_number + 1 < method.warmup_rounds:
        return None
    return form_groups(tx, found.adapter, found.task, step.report)


def _sum_groups(tx: Transaction, blobs: BlobStore, found: _Round, round_: Round) -> Fold:
    """θ + Σ_g w_g Δ_g through the task's server optimiser, with the groups of the next period."""
    task, adapter, method = found.task, found.adapter, promised(hierarchical(found.task), "its method")
    base = promised(tx.version(task.id, MAIN, round_.version_number), "a round's version")
    theta = found.bases()[None]
    made = {group.number: changes_of(tx, task, group) for group in task.groups}
    changes, newest = [], []
    for group in task.groups:
        if versions := made[group.number]:
            live = method.live_at(adapter, group.depth)
            after = decode_theta(load(blobs, versions[-1].sha256), adapter.layout, versions[-1].sha256)
            delta = live.gather(after.astype(np.float64) - theta.astype(np.float64))
            weight = sum(version.report[_WEIGHT] for version in versions) / len(versions)
            changes.append(GroupChange(live=live, delta=delta, weight=weight))
            newest.append(versions[-1].sha256)
    merged = merge_groups(changes)
    with np.errstate(over="ignore", invalid="ignore"):
        after, state = server_update(task.spec.server, theta, merged.live, merged.delta, found.state())
    if not (np.isfinite(after).all() and state.is_finite):
        raise WireError(f"the sum of its {len(changes)} groups is not finite")
    folds = [version for versions in made.values() for version in versions]
    grouping = _next_groups(tx, found, base, merged.agreement, round_.opened_at)
    return Fold(
        task_id=task.id,
        round_number=round_.number,
        sha256=save(blobs, encode_theta(after)),
        updates=(),
        group_updates=sum(version.updates for version in folds),
        examples=sum(version.examples for version in folds),
        loss_first=_mean_loss([versions[0].loss_first for versions in made.values() if versions]),
        loss_last=_mean_loss([versions[-1].loss_last for versions in made.values() if versions]),
        variants={},
        server_state=save(blobs, encode_state(state)),
        report={"groups_folded": float(len(changes))} | grouping.report,
        merged=tuple(newest),
        grouping=grouping,
    )


def _next_groups(tx: Transaction, found: _Round, base: Version, agreement: float, at: float) -> Grouping:
    """The same groups at a new pace, or every so often groups formed anew."""
    task, method = found.task, promised(hierarchical(found.task), "its method")
    same = next_period(tx, found.adapter, task, base, agreement, at)
    folds = base.number + 1 - method.warmup_rounds
    if method.regroup_every and folds % method.regroup_every == 0:
        formed = form_groups(tx, found.adapter, task, same.report)
        return formed if formed.groups else same
    return same


def _mean_loss(losses: list[float | None]) -> float:
    known = [loss for loss in losses if loss is not None]
    return sum(known) / max(1, len(known))
