"""Adapters and heads planned for a model: one function for each kind, with its papers' defaults.

All raise ConfigError with the field, the value and what is allowed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import get_args

from fedtt.adapter import AdapterSpec
from fedtt.errors import ConfigError
from fedtt.kinds import (
    DenseBottleneck,
    HeadKind,
    HeadOnly,
    HeadSpec,
    Inserted,
    Lora,
    LoraSB,
    LoraTarget,
    Site,
    Target,
    TTBottleneck,
)
from fedtt.tensor_train import TTMatrix, padded_size, plan_modes

__all__ = ["plan_adapter", "plan_dense", "plan_head", "plan_lora", "plan_lora_sb", "plan_tt"]

_SITES: tuple[Site, ...] = ("attention", "mlp")
_BOTTLENECK = 64  #: of FedTT (§5) and of Houlsby et al.; a narrower model has its own width
_TT_RANK = 5  #: of FedTT (§5)
_HEAD_RANK = 10
_LORA_SB_RANK = 32  #: r² numbers a target: those of LoRA of rank 1 at a width of 512
_LORA_RANK = 8  #: on query and value, as Hu et al. 2022 for RoBERTa on GLUE


def plan_adapter(
    inserted: Inserted, *, hidden: int, layers: int, depth: int | None = None, head: HeadSpec | None = None
) -> AdapterSpec:
    """`inserted` in the last `depth` blocks, by default in all."""
    if depth is None:
        depth = 0 if isinstance(inserted, HeadOnly) else layers
    return AdapterSpec(hidden=hidden, layers=layers, depth=depth, inserted=inserted, head=head)


def plan_tt(
    *,
    hidden: int,
    sites: tuple[Site, ...] = _SITES,
    bottleneck: int | None = None,
    rank: int | None = None,
    hidden_modes: tuple[int, ...] | None = None,
    bottleneck_modes: tuple[int, ...] | None = None,
) -> TTBottleneck:
    """Modes planned for each direction where none are given; FedTT's rank and bottleneck by default."""
    bottleneck = _bottleneck(hidden, bottleneck)
    wide = _modes("hidden", hidden, hidden_modes)
    narrow = _modes("bottleneck", bottleneck, bottleneck_modes)
    rank = _rank("adapter.rank", rank, _TT_RANK, wide, narrow)
    return TTBottleneck(
        sites=sites, down=TTMatrix(wide, narrow[::-1], rank), up=TTMatrix(narrow, wide[::-1], rank)
    )


def plan_dense(
    *, hidden: int, sites: tuple[Site, ...] = _SITES, bottleneck: int | None = None
) -> DenseBottleneck:
    """The same bottleneck as `plan_tt` has."""
    return DenseBottleneck(sites=sites, hidden=hidden, bottleneck=_bottleneck(hidden, bottleneck))


def plan_lora(
    projections: Mapping[Target, tuple[int, int]],
    *,
    targets: tuple[Target, ...] = ("query", "value"),
    rank: int = _LORA_RANK,
    alpha: float | None = None,
) -> Lora:
    """`projections` gives (d_in, d_out) of each target of the model; α is the rank where it is not given."""
    chosen = _targets(projections, targets)
    return Lora(rank=rank, alpha=float(rank if alpha is None else alpha), targets=chosen)


def plan_lora_sb(
    projections: Mapping[Target, tuple[int, int]],
    *,
    targets: tuple[Target, ...] = ("query", "value"),
    rank: int = _LORA_SB_RANK,
    alpha: float | None = None,
) -> LoraSB:
    """As `plan_lora`; between frames of norm 1 R's numbers are small, so α wants to be several ranks."""
    chosen = _targets(projections, targets)
    return LoraSB(rank=rank, alpha=float(rank if alpha is None else alpha), targets=chosen)


def _targets(
    projections: Mapping[Target, tuple[int, int]], names: tuple[Target, ...]
) -> tuple[LoraTarget, ...]:
    if foreign := [name for name in names if name not in projections]:
        raise ConfigError("adapter.targets", foreign[0], f"some of {', '.join(get_args(Target))}")
    return tuple(LoraTarget(name=n, d_in=projections[n][0], d_out=projections[n][1]) for n in names)


def plan_head(
    kind: HeadKind,
    *,
    hidden: int,
    labels: int,
    rank: int | None = None,
    hidden_modes: tuple[int, ...] | None = None,
) -> HeadSpec:
    """A head over `labels` classes; rank and modes are of its TT matrix, which a dense one has not."""
    if labels < 2:
        raise ConfigError("labels", labels, "at least 2 labels for a classifier head")
    if kind == "dense":
        return HeadSpec(kind=kind, labels=labels)
    wide, narrow = _modes("hidden", hidden, hidden_modes), plan_modes(padded_size(labels))
    rank = _rank("head_rank", rank, _HEAD_RANK, wide, narrow)
    return HeadSpec(kind=kind, labels=labels, matrix=TTMatrix(wide, narrow[::-1], rank))


def _rank(field: str, given: int | None, default: int, wide: tuple[int, ...], narrow: tuple[int, ...]) -> int:
    """A given rank is one that some bond can have; the default is cut at each to what it can."""
    if given is None:
        return default
    _check_range(field, given, max(TTMatrix(wide, narrow[::-1], math.prod(wide + narrow)).ranks))
    return given


def _bottleneck(hidden: int, given: int | None) -> int:
    bottleneck = min(_BOTTLENECK, hidden) if given is None else given
    _check_range("adapter.bottleneck", bottleneck, hidden)
    return bottleneck


def _check_range(field: str, value: int, largest: int) -> None:
    if not 1 <= value <= largest:
        raise ConfigError(field, value, f"a whole number from 1 to {largest}")


def _modes(field: str, size: int, given: tuple[int, ...] | None) -> tuple[int, ...]:
    if given is not None and (math.prod(given) != size or min(given, default=0) < 1):
        raise ConfigError(f"adapter.{field}_modes", given, f"positive modes that multiply to {size}")
    return given or plan_modes(size)
