"""What may be inserted into the blocks of a frozen model, and the head on top: closed unions of values.

Each kind says which trained matrices it puts into one block, how they are named and how they start, so
that specs, first values and summaries never ask which kind they have before them.
"""

from __future__ import annotations

import math
from typing import Annotated, ClassVar, Literal

from msgspec import Meta, Struct
from msgspec.structs import replace

from fedtt.errors import ConfigError
from fedtt.layout import Factor
from fedtt.tensor_train import TTMatrix

__all__ = [
    "AdapterKind",
    "DenseBottleneck",
    "HeadKind",
    "HeadOnly",
    "HeadSpec",
    "Inserted",
    "Lora",
    "LoraSB",
    "LoraTarget",
    "Part",
    "Rank",
    "Site",
    "TTBottleneck",
    "Target",
    "Width",
]

AdapterKind = Literal["tt", "dense", "lora", "lora-sb", "none"]
HeadKind = Literal["label-names", "tt", "dense"]
Site = Literal["attention", "mlp"]  #: whose output a bottleneck adapter changes
Target = Literal["query", "key", "value", "output"]  #: projection of the attention that LoRA changes

#: Bounds for foreign specs: with them no layout can count past 64 bits.
Width = Annotated[int, Meta(ge=1, le=2**20)]
Rank = Annotated[int, Meta(ge=1, le=2**12)]


class Part(Struct, frozen=True):
    """One trained matrix or vector: its factors, and how each starts."""

    name: str
    factors: tuple[Factor, ...]
    deviations: tuple[float, ...]  #: standard deviations of the factors' first values; 0 means zero
    matrix: TTMatrix | None = None  #: whose cores the factors are

    @property
    def size(self) -> int:
        return sum(factor.size for factor in self.factors)


def _train(name: str, matrix: TTMatrix, *, is_zero: bool = False) -> Part:
    """A TT matrix, its cores named `<name>.<k>`; the last one is zero where the matrix is to be.

    σ with Var W = σ^{2J} Π_k r_k = 1 / d_in, as W sums Π_k r_k products of J independent entries.
    """
    factors = tuple(Factor(f"{name}.{k}", shape) for k, shape in enumerate(matrix.core_shapes))
    sd = float((1 / (matrix.d_in * math.prod(matrix.ranks))) ** (1 / (2 * len(factors))))
    return Part(name, factors, (sd,) * (len(factors) - 1) + (0.0 if is_zero else sd,), matrix)


def _plain(name: str, shape: tuple[int, ...], variance: float = 0.0) -> Part:
    return Part(name, (Factor(name, shape),), (math.sqrt(variance),))


class TTBottleneck(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="kind", tag="tt"):
    """h + up(gelu(down(h))) with both matrices as tensor trains, at each site of a block.

    LoRETTA (Yang et al., NAACL 2024, arXiv 2402.11417, eq. 4); FedTT (arXiv 2410.13097, §3).
    """

    kind: ClassVar[AdapterKind] = "tt"
    sites: tuple[Site, ...]
    down: TTMatrix  #: hidden -> bottleneck
    up: TTMatrix  #: bottleneck -> hidden; its last core starts at zero

    def __post_init__(self) -> None:
        _check_places("sites", self.sites)
        if self.down.d_out != self.up.d_in:
            raise ConfigError("adapter.up", self.up.d_in, f"the bottleneck of down, {self.down.d_out}")

    @property
    def parts(self) -> tuple[Part, ...]:
        """Of one block, in the order of the layout."""
        return tuple(
            part
            for site in self.sites
            for part in (_train(f"{site}.down", self.down), _train(f"{site}.up", self.up, is_zero=True))
        )

    def at_rank(self, rank: int) -> TTBottleneck:
        _check_rank(rank, min(self.down.rank, self.up.rank))
        return replace(self, down=replace(self.down, rank=rank), up=replace(self.up, rank=rank))


class DenseBottleneck(
    Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="kind", tag="dense"
):
    """h + up(gelu(down(h))) with plain matrices, at each site of a block.

    Houlsby et al., ICML 2019, arXiv 1902.00751, §2.1, without its biases: then it is LoRETTA's eq. 4 with
    nothing left out but the tensor trains.
    """

    kind: ClassVar[AdapterKind] = "dense"
    sites: tuple[Site, ...]
    hidden: Width
    bottleneck: Width

    def __post_init__(self) -> None:
        _check_places("sites", self.sites)
        if not 1 <= self.bottleneck <= self.hidden:
            raise ConfigError(
                "adapter.bottleneck", self.bottleneck, f"a whole number from 1 to {self.hidden}"
            )

    @property
    def parts(self) -> tuple[Part, ...]:
        """Of one block: down (H, b) with variance 1 / H, up (b, H) zero."""
        h, b = self.hidden, self.bottleneck
        return tuple(
            part
            for site in self.sites
            for part in (_plain(f"{site}.down", (h, b), 1 / h), _plain(f"{site}.up", (b, h)))
        )

    def at_rank(self, rank: int) -> DenseBottleneck:
        raise ConfigError("rank", rank, "only for tt and lora adapters; a dense one has no rank")


class LoraTarget(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One projection of a block and its two sizes; with grouped queries key and value are narrower."""

    name: Target
    d_in: Width
    d_out: Width


class _LowRank(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="kind"):
    """What LoRA and its kin share."""

    rank: Rank
    alpha: Annotated[float, Meta(gt=0, le=2**20)]
    targets: tuple[LoraTarget, ...]

    def __post_init__(self) -> None:
        _check_places("targets", tuple(target.name for target in self.targets))
        narrowest = min(min(target.d_in, target.d_out) for target in self.targets)
        if not 1 <= self.rank <= narrowest:
            raise ConfigError("adapter.rank", self.rank, f"a whole number from 1 to {narrowest}")
        if not 0 < self.alpha < math.inf:
            raise ConfigError("adapter.alpha", self.alpha, "a number above 0")

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


class Lora(_LowRank, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="lora"):
    """y + (α / r) B A x on the output y = W x of each target.

    LoRA (Hu et al., ICLR 2022, arXiv 2106.09685, eq. 3).
    """

    kind: ClassVar[AdapterKind] = "lora"

    @property
    def parts(self) -> tuple[Part, ...]:
        """Of one block: A (r, d_in) with variance 1 / d_in, B (d_out, r) zero (§4.1)."""
        return tuple(
            part
            for t in self.targets
            for part in (
                _plain(f"{t.name}.lora_a", (self.rank, t.d_in), 1 / t.d_in),
                _plain(f"{t.name}.lora_b", (t.d_out, self.rank)),
            )
        )

    def at_rank(self, rank: int) -> Lora:
        """α follows the rank, so that α / r and with it the function of equal factors stays."""
        _check_rank(rank, self.rank)
        return replace(self, rank=rank, alpha=self.alpha * rank / self.rank)


class LoraSB(_LowRank, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="lora-sb"):
    """y + (α / r) B R A x, of which R (r, r) is trained between two frames that belong to the base.

    LoRA-SB (Ponkshe et al., 2024, arXiv 2411.19557, §3) takes the frames from an SVD of the first gradient on
    some of the data, and a bundle has none; LoRA-XS (Bałazy et al., 2024, arXiv 2405.17604, §3) from one of
    the frozen weight, as `export.frames` does.
    """

    kind: ClassVar[AdapterKind] = "lora-sb"

    @property
    def parts(self) -> tuple[Part, ...]:
        """Of one block: R, zero."""
        return tuple(_plain(f"{t.name}.lora_r", (self.rank, self.rank)) for t in self.targets)

    def at_rank(self, rank: int) -> LoraSB:
        raise ConfigError("rank", rank, "only for tt and lora adapters; LoRA-SB has the rank of its frames")


class HeadOnly(Struct, frozen=True, forbid_unknown_fields=True, tag_field="kind", tag="none"):
    """Nothing is inserted; the head alone is trained."""

    kind: ClassVar[AdapterKind] = "none"
    parts: ClassVar[tuple[Part, ...]] = ()

    def at_rank(self, rank: int) -> HeadOnly:
        raise ConfigError("rank", rank, "only for tt and lora adapters; nothing is inserted here")


Inserted = TTBottleneck | DenseBottleneck | Lora | LoraSB | HeadOnly


class HeadSpec(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The trained part of a classifier head over `labels` classes.

    label-names: fixed rows from the label names' own embeddings, plus a TT delta that starts at zero.
    tt: a TT matrix that starts random. dense: a matrix that starts at zero. All carry a bias.
    """

    kind: HeadKind
    labels: Annotated[int, Meta(ge=2, le=2**20)]
    matrix: TTMatrix | None = None  #: hidden -> labels (padded), for the two TT kinds

    def __post_init__(self) -> None:
        if (self.matrix is None) != (self.kind == "dense"):
            raise ConfigError("head.kind", self.kind, "dense without a TT matrix, the others with one")
        if self.matrix and self.matrix.d_out < self.labels:
            raise ConfigError(
                "head.matrix", self.matrix.d_out, f"at least {self.labels} outputs, one a label"
            )

    def parts(self, hidden: int) -> tuple[Part, ...]:
        """The weight, then the bias."""
        if self.matrix is None:
            weight = _plain("head.weight", (self.labels, hidden))
        else:
            weight = _train("head.weight", self.matrix, is_zero=self.kind == "label-names")
        return weight, _plain("head.bias", (self.labels,))


def _check_places(field: str, names: tuple[str, ...]) -> None:
    if not names or len(set(names)) != len(names):
        raise ConfigError(f"adapter.{field}", names, "one or several different names")


def _check_rank(rank: int, largest: int) -> None:
    if not 1 <= rank <= largest:
        raise ConfigError("rank", rank, f"a whole number from 1 to {largest}, the adapter's own")
