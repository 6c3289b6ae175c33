"""Rounds whose devices train at different ranks, and what they come to, by slow formulas."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from hypothesis import strategies as st
from numpy.typing import NDArray

from edge_client.tokens import Batch
from fedtt.adapter import AdapterSpec, LoraPair
from fedtt.algorithms import FedAvg
from fedtt.folds import Contribution, Mean
from fedtt.kinds import HeadKind
from fedtt.layout import Theta
from fedtt.planning import plan_adapter, plan_head, plan_lora, plan_tt
from fedtt.server_step import Step, server_step
from fedtt.task import RoundSpec, TaskSpec
from tests.support.edge import WholeSteps
from tests.support.trains import dense_matrices

__all__ = [
    "TowardsProducts",
    "at_rank",
    "bases_of",
    "device",
    "devices",
    "folded",
    "lora_adapter",
    "mean_of",
    "products",
    "tt_adapter",
]

Matrix = NDArray[np.float64]


def tt_adapter(head: HeadKind | None = "tt", rank: int = 3) -> AdapterSpec:
    """One block: down 2·4·3 | 4·2 and up 4·2 | 3·4·2; the head 2·4·3 | 5 of rank 2, and a bias."""
    modes: dict[str, Any] = {"hidden_modes": (2, 4, 3), "bottleneck_modes": (4, 2)}
    return plan_adapter(
        plan_tt(hidden=24, bottleneck=8, rank=rank, sites=("mlp",), **modes),
        hidden=24,
        layers=1,
        head=plan_head(head, hidden=24, labels=5, rank=2, hidden_modes=(2, 4, 3)) if head else None,
    )


def lora_adapter(rank: int = 3, head: HeadKind | None = "tt") -> AdapterSpec:
    """Query (10, 10) and value (10, 6), α = 2 r; the head as a train of rank 2 with 5 labels."""
    return plan_adapter(
        plan_lora({"query": (10, 10), "value": (10, 6)}, rank=rank, alpha=2.0 * rank),
        hidden=10,
        layers=1,
        head=plan_head(head, hidden=10, labels=5, rank=2) if head else None,
    )


def at_rank(adapter: AdapterSpec, rank: int | None) -> AdapterSpec:
    return adapter if rank is None else adapter.at_rank(rank)


def products(adapter: AdapterSpec, theta: NDArray[np.floating[Any]]) -> dict[str, Matrix]:
    """Every matrix that some factors stand for: of trains entry by entry, of LoRA pairs B A."""
    places = zip(adapter.layout.slices, adapter.layout.factors, strict=True)
    named = [theta[numbers].reshape(factor.shape) for numbers, factor in places]
    pairs = {p.prefix: named[p.b].astype(np.float64) @ named[p.a] for p in adapter.lora_pairs}
    return dense_matrices(adapter, theta) | pairs


def bases_of(method: FedAvg, adapter: AdapterSpec, theta: Theta) -> dict[int | None, Theta]:
    return {None: theta, **{rank: method.variant(adapter, theta, rank) for rank in method.ranks}}


def device(
    adapter: AdapterSpec, rank: int | None = None, seed: int = 0, size: float = 0.1, examples: int = 1
) -> Contribution:
    """A random delta with entries of this size."""
    rng = np.random.default_rng(seed)
    delta = size * rng.standard_normal(at_rank(adapter, rank).layout.size)
    return Contribution(delta=delta.astype(np.float32), examples=examples, rank=rank)


def devices(
    adapter: AdapterSpec, ranks: Sequence[int | None], *, most: int = 5, sizes: Sequence[float] = (0.1,)
) -> st.SearchStrategy[list[Contribution]]:
    one = st.builds(
        device,
        st.just(adapter),
        st.sampled_from(ranks),
        st.integers(0, 2**32),
        st.sampled_from(sizes),
        st.integers(1, 50),
    )
    return st.lists(one, min_size=1, max_size=most)


def mean_of(
    adapter: AdapterSpec, bases: Mapping[int | None, Theta], given: Sequence[Contribution]
) -> tuple[dict[str, Matrix], dict[str, Matrix]]:
    """Σ_k (n_k / n) M_k by name, M_k a device's products; and the same of M_k less those of its base."""
    total = sum(c.examples for c in given)
    means: dict[str, Matrix] = {}
    changes: dict[str, Matrix] = {}
    for c in given:
        spec, base = at_rank(adapter, c.rank), bases[c.rank].astype(np.float64)
        before, after = products(spec, base), products(spec, base + c.delta)
        for name in before:
            share = c.examples / total
            means[name] = means.get(name, 0.0) + share * after[name]
            changes[name] = changes.get(name, 0.0) + share * (after[name] - before[name])
    return means, changes


def folded(method: FedAvg, adapter: AdapterSpec, theta: Theta, given: Any, fold: Mean | None = None) -> Step:
    """The round through the server's own step."""
    spec = TaskSpec(name="t", rounds=RoundSpec(count=1, cohort=1), method=method, fold=fold or Mean())
    live = method.live(adapter, 1)
    return server_step(spec, adapter, bases_of(method, adapter, theta), live, given, None)


class TowardsProducts(WholeSteps):
    """A Runtime with the loss ½ Σ ‖B A − W*‖² over all LoRA pairs; W* depends on the batch's mean label."""

    def __init__(self, adapter: AdapterSpec, seed: int = 0) -> None:
        self._adapter, rng = adapter, np.random.default_rng(seed)
        shapes = [
            (adapter.layout.factors[p.b].shape[0], adapter.layout.factors[p.a].shape[1]) for p in self._pairs
        ]
        self._mean = [rng.standard_normal(shape) for shape in shapes]
        self._skew = [rng.standard_normal(shape) for shape in shapes]

    @property
    def _pairs(self) -> tuple[LoraPair, ...]:
        return self._adapter.lora_pairs

    def gradient(self, theta: Theta, batch: Batch) -> tuple[float, Theta]:
        assert batch.labels is not None
        share, loss, grad = float(batch.labels.mean()) / 4 - 0.5, 0.0, np.zeros_like(theta)
        places = zip(self._adapter.layout.slices, self._adapter.layout.factors, strict=True)
        named = [theta[numbers].reshape(factor.shape) for numbers, factor in places]
        for pair, mean, skew in zip(self._pairs, self._mean, self._skew, strict=True):
            away = named[pair.b] @ named[pair.a] - mean - share * skew
            loss += 0.5 * float((away**2).sum())
            grad[self._adapter.layout.slices[pair.a]] = (named[pair.b].T @ away).reshape(-1)
            grad[self._adapter.layout.slices[pair.b]] = (away @ named[pair.a].T).reshape(-1)
        return loss, grad

    def logits(self, theta: Theta, batch: Batch) -> NDArray[np.float32]:
        return np.zeros((len(batch.ids), 5), np.float32)
