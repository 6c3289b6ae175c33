"""What a person asks of export, checked before anything heavy is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from fedtt.adapter import AdapterSpec
from fedtt.errors import ConfigError
from fedtt.kinds import AdapterKind, HeadKind, HeadOnly, HeadSpec, Inserted, Site, Target
from fedtt.manifest import Precision, Products
from fedtt.planning import plan_adapter, plan_dense, plan_head, plan_lora, plan_lora_sb, plan_tt

__all__ = ["ExportRequest", "RuntimeKind", "TaskKind"]

TaskKind = Literal["sequence-classification", "causal-lm"]
RuntimeKind = Literal["onnxruntime", "executorch"]

_OPTIONS: dict[AdapterKind, tuple[str, ...]] = {
    "tt": ("depth", "sites", "bottleneck", "rank", "hidden_modes", "bottleneck_modes"),
    "dense": ("depth", "sites", "bottleneck"),
    "lora": ("depth", "targets", "rank", "alpha"),
    "lora-sb": ("depth", "targets", "rank", "alpha"),
    "none": (),
}
_DEEPEST = 3  #: deeper ones gain less, and take longer to compile
_SOME_KINDS = tuple(dict.fromkeys(name for names in _OPTIONS.values() for name in names))


@dataclass(frozen=True, kw_only=True)
class ExportRequest:
    """A base model, a task and an adapter; FedTT's adapter by default (arXiv 2410.13097, §5).

    None stands for a kind's own default. An option that the chosen kind does not have is refused.
    """

    model: str  #: a directory or a hub id
    task: TaskKind = "sequence-classification"
    labels: tuple[str, ...] = ()  #: names in order of their index; none for causal-lm
    adapter: AdapterKind = "tt"
    depth: int | None = None  #: how many of the last blocks are adapted; None for all
    rank: int | None = None  #: 5 for tt, 8 for lora, 32 for lora-sb
    bottleneck: int | None = None  #: of tt and dense; 64, or the model's width if less
    sites: tuple[Site, ...] | None = None  #: of tt and dense; after attention and MLP
    hidden_modes: tuple[int, ...] | None = None  #: of TT matrices; planned where not given
    bottleneck_modes: tuple[int, ...] | None = None
    alpha: float | None = None  #: of lora and lora-sb; its rank
    targets: tuple[Target, ...] | None = None  #: of lora and lora-sb; query and value
    head: HeadKind | None = None  #: of a classifier; label-names
    head_rank: int | None = None  #: of a head with a TT matrix; 10
    depths: tuple[int, ...] | None = None  #: at which the step is compiled over a cached prefix; up to 3
    base: Precision = "fp32"  #: in which the base's matrices are stored
    products: Products = "fp32"  #: in which those of its blocks are multiplied with
    max_tokens: int = 128  #: longer texts are cut
    seed: int = 0  #: of the factors' first values
    private: bool = False  #: whether a step that clips each example's gradient is compiled too, for DP-SGD
    runtimes: tuple[RuntimeKind, ...] = ("onnxruntime",)  #: with onnxruntime always, which judges versions

    def __post_init__(self) -> None:
        _check_one_of("task", self.task, TaskKind)
        _check_one_of("adapter", self.adapter, AdapterKind)
        self._check_head()
        self._check_options()
        for site in self.sites or ():
            _check_one_of("sites", site, Site)
        _check_one_of("base", self.base, Precision)
        for runtime in self.runtimes:
            _check_one_of("runtimes", runtime, RuntimeKind)
        self._check_products()
        for target in self.targets or ():
            _check_one_of("targets", target, Target)

    @property
    def head_kind(self) -> HeadKind | None:
        """The head that the task gets: none for causal-lm."""
        return None if self.task == "causal-lm" else self.head or "label-names"

    def plan(self, *, hidden: int, layers: int, projections: Mapping[Target, tuple[int, int]]) -> AdapterSpec:
        """The adapter for a base of this width and depth, with projections of these (d_in, d_out)."""
        return plan_adapter(
            self._inserted(hidden, projections),
            hidden=hidden,
            layers=layers,
            depth=self.depth,
            head=self._head(hidden),
        )

    def cut_depths(self, spec: AdapterSpec) -> tuple[int, ...]:
        """The depths at which the step is compiled with what lies below computed apart, rising."""
        allowed = range(min(1, spec.depth), min(spec.depth, spec.layers - 1) + 1)
        if self.depths is None:
            return tuple(depth for depth in allowed if depth <= _DEEPEST)
        for depth in self.depths:
            if depth not in allowed:
                raise ConfigError(
                    "depths", depth, f"from {allowed.start} to {allowed.stop - 1} for this adapter"
                )
        return tuple(sorted(set(self.depths)))

    def _inserted(self, hidden: int, projections: Mapping[Target, tuple[int, int]]) -> Inserted:
        options = self._given(*(name for name in _OPTIONS[self.adapter] if name != "depth"))
        match self.adapter:
            case "tt":
                return plan_tt(hidden=hidden, **options)
            case "dense":
                return plan_dense(hidden=hidden, **options)
            case "lora":
                return plan_lora(projections, **options)
            case "lora-sb":
                return plan_lora_sb(projections, **options)
            case "none":
                return HeadOnly()

    def _head(self, hidden: int) -> HeadSpec | None:
        if self.head_kind is None:
            return None
        options = self._given("hidden_modes")
        if self.head_rank is not None:
            options["rank"] = self.head_rank
        return plan_head(self.head_kind, hidden=hidden, labels=len(self.labels), **options)

    def _given(self, *names: str) -> dict[str, Any]:
        """Those of the named options that are not left to their defaults."""
        values = {name: getattr(self, name) for name in names}
        return {name: value for name, value in values.items() if value is not None}

    def _check_head(self) -> None:
        if self.task == "causal-lm":
            names = {"labels": f"{len(self.labels)} names"} if self.labels else {}
            for name, value in (names | self._given("head", "head_rank")).items():
                raise ConfigError(name, value, "none for causal-lm, which has no head; leave it out")
        if self.head is not None:
            _check_one_of("head", self.head, HeadKind)
        if self.head == "dense" and self.head_rank is not None:
            raise ConfigError("head_rank", self.head_rank, "only for the heads label-names and tt")
        if self.head_kind is None and self.adapter == "none":
            raise ConfigError("adapter", "none", "only with a head: causal-lm would have nothing to train")

    def _check_products(self) -> None:
        _check_one_of("products", self.products, Products)
        if self.products == "fp32":
            return
        if self.base != "int8":
            raise ConfigError(
                "products", self.products, "only with base = 'int8', whose integers are multiplied"
            )

    def _check_options(self) -> None:
        own = _OPTIONS[self.adapter]
        if self.head_kind in ("label-names", "tt"):
            own = (*own, "hidden_modes")
        for name, value in self._given(*_SOME_KINDS).items():
            if name not in own:
                has = f"has {', '.join(own)}" if own else "has no options"
                raise ConfigError(name, value, f"not an option of a {self.adapter} adapter, which {has}")


def _check_one_of(field: str, value: object, kinds: object) -> None:
    if value not in get_args(kinds):
        raise ConfigError(field, value, f"one of {', '.join(get_args(kinds))}")
