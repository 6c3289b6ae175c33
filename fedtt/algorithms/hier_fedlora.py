"""HierFedLoRA: near-IID groups that train apart, each as deep and as often as it is worth it.

J. Liu, Y. Liao, H. Xu, Y. Xu. "Resource-efficient federated fine-tuning large language models for
heterogeneous data". 2025, arXiv 2503.21213. HierFedTT is the same over the tensor-train adapters of FedTT
(Ghiasvand et al., Findings of ACL 2025, arXiv 2410.13097), and ours.

Groups: `near_iid`. Their pace: `pace`. What they come to: `group_fold`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from msgspec import Meta

from fedtt.adapter import AdapterSpec
from fedtt.algorithms.fedavg import FedAvg
from fedtt.algorithms.kind_check import check_kind
from fedtt.errors import ConfigError
from fedtt.label_counts import LABEL_LIMIT
from fedtt.layout import LiveSet

if TYPE_CHECKING:
    from fedtt.task import TaskSpec

__all__ = ["HierFedLoRA", "HierFedTT", "Hierarchical"]


class Hierarchical(FedAvg, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Ordinary rounds first, in which devices are measured; then groups, and global folds of groups.

    Between two global folds group g holds τ_g rounds of its own on a branch of its own, in which the last
    d_g adapted blocks and the head are trained and sent; then θ ← θ + Σ_g w_g Δ_g, for each factor over the
    groups that trained it, and every group goes on from there. So blocks below a group's depth come down to
    it when others have changed them. The task's server optimiser takes the global step alone.
    """

    any_base: ClassVar[bool] = False
    any_depth: ClassVar[bool] = False

    groups: Annotated[int, Meta(ge=2, le=64)] = 4
    warmup_rounds: Annotated[int, Meta(ge=1, le=10**6)] = 2  #: ordinary rounds before the first grouping
    regroup_every: Annotated[int, Meta(ge=0, le=10**6)] = 0  #: global folds; 0 keeps the first groups
    max_frequency: Annotated[int, Meta(ge=1, le=64)] = 4  #: τ_max
    min_depth: Annotated[int, Meta(ge=1, le=2**10)] = 1  #: least d_g
    time_weight: Annotated[float, Meta(ge=0, le=100)] = 0.3  #: λ: of like speed within a group against labels
    bytes_weight: Annotated[float, Meta(ge=0, le=1)] = 0.5  #: β: of bytes against seconds
    label_epsilon: Annotated[float, Meta(ge=0.01, le=100)] | None = None  #: ε of label counts; None asks none
    label_source: Literal["devices", "updates"] = "devices"  #: who says a device's labels; `label_estimate`

    def live_at(self, adapter: AdapterSpec, depth: int) -> LiveSet:
        """The factors of the last `depth` blocks, and the head."""
        return adapter.live_at(depth, adapter.layout.everything)

    def check_task(self, task: TaskSpec) -> None:
        if task.evaluation is not None:
            raise ConfigError(
                "evaluation", "…", "left out: groups go on from a version as it is put together"
            )
        if self.label_source == "updates" and self.label_epsilon is not None:
            raise ConfigError(
                "method.label_epsilon",
                self.label_epsilon,
                "left out with label_source = 'updates', which asks no device",
            )
        rounds, least = task.rounds, self.groups * task.fold.least
        if rounds.cohort < least:
            raise ConfigError(
                "rounds.cohort", rounds.cohort, f"at least {least}, so that each of the groups has its seats"
            )
        if rounds.count <= self.warmup_rounds:
            raise ConfigError(
                "method.warmup_rounds", self.warmup_rounds, f"below rounds.count = {rounds.count}"
            )
        if task.sampling.separation:
            raise ConfigError(
                "sampling.separation",
                task.sampling.separation,
                "0 with groups, whose rounds go on side by side; sampling.participation_cap holds",
            )

    def check_options(self, adapter: AdapterSpec) -> None:
        """Raise ConfigError where an option does not fit the adapters."""
        if self.min_depth > adapter.depth:
            raise ConfigError(
                "method.min_depth", self.min_depth, f"at most {adapter.depth}, the bundle's adapted blocks"
            )
        labels = adapter.head.labels if adapter.head else 0
        for name, asked in (
            ("label_epsilon", self.label_epsilon is not None),
            ("label_source", self.label_source == "updates"),
        ):
            if asked and not 0 < labels <= LABEL_LIMIT:
                raise ConfigError(
                    f"method.{name}",
                    getattr(self, name),
                    f"only for a bundle with labels, at most {LABEL_LIMIT}",
                )


class HierFedLoRA(Hierarchical, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="hier-fedlora"):
    """On LoRA's two factors, each averaged by itself."""

    def check(self, adapter: AdapterSpec) -> None:
        check_kind(adapter, "hier-fedlora", "lora")
        self.check_options(adapter)


class HierFedTT(Hierarchical, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="hier-fedtt"):
    """On tensor-train adapters, each core averaged by itself."""

    def check(self, adapter: AdapterSpec) -> None:
        check_kind(adapter, "hier-fedtt", "tt")
        self.check_options(adapter)
