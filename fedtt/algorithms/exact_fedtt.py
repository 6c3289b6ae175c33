"""Exact FedTT: one live core a tensor train, so that averaging cores averages matrices.

Ours, on the adapters of FedTT (Ghiasvand et al., Findings of ACL 2025, arXiv 2410.13097). It takes from
- the alternating scheme: S. Holtz, T. Rohwedder, R. Schneider. "The alternating linear scheme for tensor
  optimization in the tensor train format". SIAM J. Sci. Comput. 34 (2012), A683-A713;
- the greedy choice: J. Nutini, M. Schmidt, I. Laradji, M. Friedlander, H. Koepke. "Coordinate descent
  converges faster with the Gauss-Southwell rule than random selection". ICML 2015, arXiv 1506.00552;
- exactness by freezing one of two factors: Y. Sun, Z. Li, Y. Li, B. Ding. "Improving LoRA in
  privacy-preserving federated learning". ICLR 2024, arXiv 2403.12313 (FFA-LoRA).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Annotated, Literal

import numpy as np
from msgspec import Meta

from fedtt.adapter import AdapterSpec, TTFactors
from fedtt.algorithms.base import Batch, Folded, LocalResult, Steps
from fedtt.algorithms.fedavg import FedAvg, local_steps
from fedtt.algorithms.gauge import Gauge
from fedtt.algorithms.trains import check_trains, outside_trains, sided_trains
from fedtt.errors import ConfigError
from fedtt.folds import Contribution, Fold
from fedtt.layout import LiveSet, Theta
from fedtt.optimiser import TrainingSpec
from fedtt.server_optimiser import ServerState

__all__ = ["ExactFedTT"]


class ExactFedTT(
    FedAvg, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True, tag="exact-fedtt"
):
    """W = L G_k R is linear in one core, so Σ_k w_k L (G + Δ_k) R = L (G + Σ_k w_k Δ_k) R.

    What is exact: the mean of each TT matrix, for one base, one gauge and one live set. What is not: the
    function of an adapter, up(gelu(down(h))), while both its matrices are live; it is while `up` alone is.
    Folds that are no weighted mean (a median of cores is no median of matrices) run, and lose the word:
    the report's `exact_mean` says which it was. Server optimisers see the exact mean as their
    pseudo-gradient, and keep their moments by core.

    With `whole_head` all cores of the head are live in every round, as with `FedTT`, so that both have the
    same head. The mean of the head is then that of each core, not of its matrix, and no epoch and no gauge is
    its own; all that is said here, `exact_mean` too, is of the adapters alone.

    Biases and dense matrices are live in every round, unless `cores_only`: a bias is added to a matrix's
    product and a dense matrix is its own only factor, so the mean stays exact, and both are few beside the
    cores.

    schedule: which core of each train is live in an epoch, always beginning with the last, the only one
    with a gradient where a train starts at zero.
      cyclic: from the last to the first, and again.
      sweep: from the last to the first and back (ALS).
      norm: the one whose last fold moved it most, as a root mean square, those never folded first; every
        second round is the cyclic one, so that no core is judged for ever by a norm of long ago.
      alternate: as cyclic, the `up` of each adapter in one epoch and its `down` in the next; the head in
        both.
    """

    schedule: Literal["cyclic", "norm", "sweep", "alternate"] = "cyclic"
    epoch_rounds: Annotated[int, Meta(ge=1, le=10**6)] = 1  #: rounds that each live set lasts
    cores_only: bool = False  #: biases and dense matrices stay as they started
    whole_head: bool = False  #: all cores of the head are live in every round, and their mean is not exact
    orthogonal: bool = False  #: train and send in coordinates whose norm is that of the matrix (`Gauge`)

    def __post_init__(self) -> None:
        if self.schedule == "norm" and self.epoch_rounds != 1:
            raise ConfigError(
                "method.epoch_rounds",
                self.epoch_rounds,
                "1 with schedule 'norm', which chooses at every fold",
            )

    @property
    def residual_lasts(self) -> bool:
        return not self.orthogonal

    def same_gauge(self, earlier: int, later: int) -> bool:
        """Within an epoch only the live set moves: what surrounds it, and with it the gauge, stays.

        A whole head has no gauge; its late updates of an epoch are folded core by core, as those of `FedTT`.
        """
        return self._epoch(earlier) == self._epoch(later)

    def check(self, adapter: AdapterSpec) -> None:
        check_trains(adapter, "exact-fedtt", whole_head=self.whole_head)
        if adapter.inserted.kind in ("lora", "lora-sb"):
            raise ConfigError(
                "method.name", "exact-fedtt", "not for LoRA, whose matrices it would train whole"
            )

    def live(self, adapter: AdapterSpec, round_number: int, state: ServerState | None = None) -> LiveSet:
        """One core of every train, or of every second one, and all of a whole head; rounds count from 1.

        Until a first fold the first epoch goes on, for rounds may fail: where a train starts at zero, nothing
        but its last core would learn.
        """
        epoch = 0 if state is None else self._epoch(round_number)
        chosen = set[int]() if self.cores_only else set(outside_trains(adapter))
        for side, train in sided_trains(adapter):
            if side == "head" and self.whole_head:
                chosen.update(train.indices)
            elif self.schedule != "alternate":
                chosen.add(train.indices[self._core(train, epoch, state)])
            elif side == "head":
                chosen.add(train.indices[_cyclic(train, epoch)])
            elif side == ("up", "down")[epoch % 2]:
                chosen.add(train.indices[_cyclic(train, epoch // 2)])
        return LiveSet(adapter.layout, sorted(chosen))

    def client_step(
        self,
        adapter: AdapterSpec,
        theta: Theta,
        live: LiveSet,
        batches: Iterable[Batch],
        training: TrainingSpec,
    ) -> Steps[Batch]:
        """A few optimiser steps on the live cores: on G, or on G', where Δ, too, is of G'."""
        if not self.orthogonal:
            return local_steps(theta, live, batches, training)
        return _steps_in(Gauge(adapter, theta, live), theta, live, batches, training)

    def fold(
        self,
        adapter: AdapterSpec,
        bases: Mapping[int | None, Theta],
        live: LiveSet,
        contributions: Iterable[Contribution],
        fold: Fold,
    ) -> Folded:
        """Σ_k w_k Δ_k, taken back to G where it is of G'."""
        delta = fold.combine(live.size, contributions)
        if self.orthogonal:
            delta = Gauge(adapter, bases[None], live).leave(delta)
        return Folded(delta=delta, report={"exact_mean": float(fold.linear)})

    def _epoch(self, round_number: int) -> int:
        return (round_number - 1) // self.epoch_rounds

    def _core(self, train: TTFactors, epoch: int, state: ServerState | None) -> int:
        match self.schedule:
            case "sweep":
                last = len(train.indices) - 1
                return abs(last - epoch % (2 * last))
            case "norm":
                return _greedy(train, epoch, state)
            case _:
                return _cyclic(train, epoch)


def _cyclic(train: TTFactors, turn: int) -> int:
    return len(train.indices) - 1 - turn % len(train.indices)


def _greedy(train: TTFactors, epoch: int, state: ServerState | None) -> int:
    """Gauss-Southwell by the norms of the cores' last folded deltas, not of gradients, which nobody computes
    of a core that is not live; of equals the last core."""
    sizes = [r0 * n * r1 for r0, n, r1 in train.matrix.core_shapes]
    norms = np.full(len(sizes), np.nan) if state is None else state.norms[list(train.indices)]
    unseen = np.flatnonzero(np.isnan(norms))
    if len(unseen):
        return int(unseen[-1])
    if epoch % 2:
        return _cyclic(train, epoch // 2)
    return len(sizes) - 1 - int(np.argmax((norms / np.sqrt(sizes))[::-1]))


def _steps_in(
    gauge: Gauge, theta: Theta, live: LiveSet, batches: Iterable[Batch], training: TrainingSpec
) -> Steps[Batch]:
    """Local training whose optimiser, proximal term and delta are of G' = S_L G S_R."""
    inner, outer = theta.copy(), theta.copy()
    inner[live.positions] = gauge.enter(live.gather(theta))
    steps = local_steps(inner, live, batches, training)
    try:
        at, batch = next(steps)
        while True:
            outer[live.positions] = gauge.leave(live.gather(at))
            loss, gradient = yield outer, batch
            pull = gauge.leave(live.gather(gradient)).astype(np.float32)
            at, batch = steps.send((loss, live.scatter(pull)))
    except StopIteration as end:
        result: LocalResult = end.value
        return result
