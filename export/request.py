"""What a person asks of export, checked before anything heavy is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from fedtt.adapter import AdapterSpec, HeadKind, Site, plan_adapter
from fedtt.errors import ConfigError

__all__ = ["ExportRequest", "TaskKind"]

TaskKind = Literal["sequence-classification", "causal-lm"]


@dataclass(frozen=True, kw_only=True)
class ExportRequest:
    """A base model, a task and an adapter; FedTT's adapter by default (arXiv 2410.13097, §5)."""

    model: str  #: a directory or a hub id
    task: TaskKind = "sequence-classification"
    labels: tuple[str, ...] = ()  #: names in order of their index; none for causal-lm
    head: HeadKind | None = "label-names"  #: of a classifier; ignored for causal-lm
    rank: int = 5
    bottleneck: int | None = None
    depth: int | None = None  #: how many of the last blocks are adapted; None for all
    sites: tuple[Site, ...] = ("attention", "mlp")
    head_rank: int = 10
    hidden_modes: tuple[int, ...] | None = None  #: planned where not given
    bottleneck_modes: tuple[int, ...] | None = None
    max_tokens: int = 128  #: longer texts are cut
    seed: int = 0  #: of the factors' first values

    def __post_init__(self) -> None:
        if self.task not in get_args(TaskKind):
            raise ConfigError("task", self.task, f"one of {', '.join(get_args(TaskKind))}")
        if self.task == "causal-lm" and self.labels:
            raise ConfigError("labels", f"{len(self.labels)} names", "none for causal-lm; leave them out")
        if self.task != "causal-lm" and self.head not in get_args(HeadKind):
            raise ConfigError("head", self.head, f"one of {', '.join(get_args(HeadKind))}")
        if foreign := set(self.sites) - set(get_args(Site)):
            raise ConfigError("sites", min(foreign), f"one or both of {', '.join(get_args(Site))}")

    def plan(self, *, hidden: int, layers: int) -> AdapterSpec:
        """The adapter for a base of this width and depth."""
        return plan_adapter(
            hidden=hidden,
            layers=layers,
            depth=self.depth,
            sites=self.sites,
            bottleneck=self.bottleneck,
            rank=self.rank,
            hidden_modes=self.hidden_modes,
            bottleneck_modes=self.bottleneck_modes,
            head=None if self.task == "causal-lm" else self.head,
            labels=len(self.labels),
            head_rank=self.head_rank,
        )
