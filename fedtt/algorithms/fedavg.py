"""Federated averaging.

H. B. McMahan, E. Moore, D. Ramage, S. Hampson, B. Agüera y Arcas. "Communication-efficient learning of
deep networks from decentralized data". AISTATS 2017, arXiv 1602.05629.

FedProx: T. Li, A. K. Sahu, M. Zaheer, M. Sanjabi, A. Talwalkar, V. Smith. "Federated optimization in
heterogeneous networks". MLSys 2020, arXiv 1812.06127.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from fedtt.adapter import AdapterSpec
from fedtt.algorithms.base import Batch, Folded, LocalResult, Moved, Steps
from fedtt.folds import Contribution, Fold
from fedtt.layout import LiveSet, Theta
from fedtt.optimiser import Optimiser, TrainingSpec
from fedtt.server_optimiser import ServerState

if TYPE_CHECKING:
    from fedtt.task import TaskSpec

__all__ = ["FedAvg", "local_steps"]


class FedAvg(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="name", tag="fedavg"):
    """Every trained number is sent and averaged, whatever the adapters are."""

    any_base: ClassVar[bool] = True  #: whether deltas from an older version can be folded onto a newer one
    any_depth: ClassVar[bool] = True  #: whether a task may leave the lower blocks out, `training.depth`

    @property
    def ranks(self) -> tuple[int, ...]:
        """Ranks below the adapter's own that devices may train at, each a variant with its own versions."""
        return ()

    def rank_for(self, memory_mb: int, time_s: float | None = None) -> int | None:
        """The rank of a device with so much memory (0: it did not say); None for the adapter's own.

        time_s: of its last training, at full depth, with the way there and back; None where not measured.
        """
        return None

    @property
    def residual_lasts(self) -> bool:
        """Whether numbers mean the same in every round: what rounding lost in one is added in another."""
        return True

    def same_gauge(self, earlier: int, later: int) -> bool:
        """Whether a delta trained in a round means the same in a later one with the same live set."""
        return True

    def check(self, adapter: AdapterSpec) -> None:
        """Raise ConfigError where the method cannot train these adapters."""

    def check_task(self, task: TaskSpec) -> None:
        """Raise ConfigError where the rest of a task does not go with the method."""

    def live(self, adapter: AdapterSpec, round_number: int, state: ServerState | None = None) -> LiveSet:
        """The factors trained and sent in a round: all."""
        return adapter.layout.everything

    def space(self, adapter: AdapterSpec, live: LiveSet) -> LiveSet:
        """The numbers that folds and server optimisers see: those that are live."""
        return live

    def client_step(
        self,
        adapter: AdapterSpec,
        theta: Theta,
        live: LiveSet,
        batches: Iterable[Batch],
        training: TrainingSpec,
    ) -> Steps[Batch]:
        """ClientUpdate of Algorithm 1: a few optimiser steps from theta; one per batch."""
        return local_steps(theta, live, batches, training)

    def fold(
        self,
        adapter: AdapterSpec,
        bases: Mapping[int | None, Theta],
        live: LiveSet,
        contributions: Iterable[Contribution],
        fold: Fold,
    ) -> Folded:
        """Σ_k (n_k / n) Δ_k, or what stands in the mean's place (Algorithm 1).

        bases: rank -> the factors its devices trained from; None for the adapter's own rank.
        """
        return Folded(delta=fold.combine(live.size, contributions))

    def moved(self, adapter: AdapterSpec, theta: Theta, live: LiveSet, step: NDArray[np.float64]) -> Moved:
        """θ + step, a step of `space`; what it is cut to where that has more dimensions than the factors."""
        return Moved(theta=theta + live.scatter(step))

    def variant(self, adapter: AdapterSpec, theta: Theta, rank: int) -> Theta:
        """The factors of a new version at another of `ranks`, (P_rank,)."""
        raise ValueError(f"{type(self).__name__} trains at one rank")


def local_steps(
    theta: Theta, live: LiveSet, batches: Iterable[Batch], training: TrainingSpec
) -> Steps[Batch]:
    """Optimise the live factors over the batches, in order, and return how they moved.

    With `training.proximal` = μ > 0 each device minimises F_k(θ) + μ/2 ‖θ - θ_t‖² (FedProx, eq. 2).
    """
    start = live.gather(theta)
    current, moved = theta.copy(), start.copy()
    optimiser = Optimiser(training, live.size)
    mu = np.float32(training.proximal)
    losses: list[float] = []
    for batch in batches:
        loss, grad = yield current, batch
        pull = live.gather(grad)
        if mu:
            pull = pull + mu * (moved - start)  # ∇ of the second term of FedProx, eq. 2
        optimiser.step_(moved, pull)  # Algorithm 1, ClientUpdate: w ← w - η ∇ℓ(w; b), or what stands for it
        current[live.positions] = moved
        losses.append(loss)
    if not losses:
        raise ValueError("local training needs at least one batch")
    return LocalResult(delta=moved - start, steps=len(losses), loss_first=losses[0], loss_last=losses[-1])
