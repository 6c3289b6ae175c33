"""One small adapter of each kind, over a model of any width."""

from __future__ import annotations

from fedtt.adapter import AdapterSpec
from fedtt.kinds import AdapterKind, HeadKind, HeadOnly, Inserted, Target
from fedtt.planning import plan_adapter, plan_dense, plan_head, plan_lora, plan_lora_sb, plan_tt

__all__ = ["KINDS", "inserted", "small_adapter"]

KINDS: tuple[AdapterKind, ...] = ("tt", "dense", "lora", "lora-sb", "none")


def inserted(kind: AdapterKind, hidden: int, *, rank: int = 2, narrow: int | None = None) -> Inserted:
    """Bottleneck 8, rank 2; `narrow` is the output of a value projection with grouped queries."""
    sizes: dict[Target, tuple[int, int]] = {"query": (hidden, hidden), "value": (hidden, narrow or hidden)}
    match kind:
        case "tt":
            return plan_tt(hidden=hidden, bottleneck=8, rank=rank)
        case "dense":
            return plan_dense(hidden=hidden, bottleneck=8)
        case "lora":
            return plan_lora(sizes, rank=rank, alpha=2 * rank)
        case "lora-sb":
            return plan_lora_sb(sizes, rank=rank, alpha=2 * rank)
        case "none":
            return HeadOnly()


def small_adapter(
    kind: AdapterKind,
    *,
    hidden: int,
    layers: int,
    depth: int | None = None,
    rank: int = 2,
    head: HeadKind | None = None,
    labels: int = 4,
    narrow: int | None = None,
) -> AdapterSpec:
    return plan_adapter(
        inserted(kind, hidden, rank=rank, narrow=narrow),
        hidden=hidden,
        layers=layers,
        depth=None if kind == "none" else depth,
        head=plan_head(head, hidden=hidden, labels=labels, rank=2) if head else None,
    )
