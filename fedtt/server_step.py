"""One fold: a method's deltas, through the task's fold and server optimiser, to the next version."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
from msgspec import Struct

from fedtt.adapter import AdapterSpec
from fedtt.folds import Contribution
from fedtt.layout import LiveSet, Theta
from fedtt.server_optimiser import ServerState, optimiser_step, published
from fedtt.task import TaskSpec

__all__ = ["Step", "server_step"]


class Step(Struct, frozen=True, kw_only=True):
    """What a fold makes."""

    theta: Theta  #: of the next version, (P,)
    variants: dict[int, Theta]  #: and at each of the method's other ranks, (P_rank,)
    state: ServerState  #: to be given to the next fold
    report: dict[str, float]  #: what the method measured

    @property
    def is_finite(self) -> bool:
        numbers = [self.theta, *self.variants.values(), np.array(list(self.report.values()))]
        return self.state.is_finite and all(bool(np.isfinite(n).all()) for n in numbers)


def server_step(
    spec: TaskSpec,
    adapter: AdapterSpec,
    bases: Mapping[int | None, Theta],
    live: LiveSet,
    contributions: Iterable[Contribution],
    state: ServerState | None,
) -> Step:
    """Fold contributions, in ledger order, onto bases[None]; the same ledger gives the same bits.

    bases: rank -> factors of the base version at that rank, None for the adapter's own. What is not finite
    stays so, for the caller to refuse: then there may be no variants.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        method, space = spec.method, spec.method.space(adapter, live)
        folded = method.fold(adapter, bases, live, contributions, spec.fold)
        step, state = optimiser_step(spec.server, space, folded.delta, state)
        moved = method.moved(adapter, bases[None], live, step)
        theta = published(spec.server, moved.theta)
        sound = bool(np.isfinite(theta).all())
        variants = {r: method.variant(adapter, theta, r) for r in method.ranks} if sound else {}
    return Step(theta=theta, variants=variants, state=state, report=folded.report | moved.report)
