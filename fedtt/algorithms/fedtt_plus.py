"""FedTT+: FedTT in which most cores are frozen in each round, for strongly heterogeneous data.

S. Ghiasvand, Y. Yang, Z. Xue, M. Alizadeh, Z. Zhang, R. Pedarsani. "Communication-efficient and
tensorized federated fine-tuning of large language models". Findings of ACL 2025, arXiv 2410.13097.

Theirs: portions of the tensor factors are frozen, in turn, which brings the mean of the cores nearer to
that of the matrices; the first, the last and one core between them are trained. Ours, where the paper
leaves a choice: in which order the core between goes round, for how many rounds each stays, and that a
head which is a tensor train is treated as the adapters are, unless `whole_head`, while biases and a
dense head, being no trains, are trained in every round.
"""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta

from fedtt.adapter import AdapterSpec
from fedtt.algorithms.fedavg import FedAvg
from fedtt.algorithms.trains import check_trains, outside_trains, sided_trains
from fedtt.errors import ConfigError
from fedtt.layout import LiveSet
from fedtt.server_optimiser import ServerState

__all__ = ["FedTTPlus"]


class FedTTPlus(
    FedAvg, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True, tag="fedtt-plus"
):
    """Of every train G_1 ··· G_J, the cores G_1, G_j and G_J are trained, sent and averaged core by core.

    With μ = 0, 1, 2, … counting periods of rounds, j = 2 + μ mod (J - 2). Three live cores still leave
    cross terms, Ḡ_1 Ḡ_j Ḡ_J is not the mean of the products; a train of two or three cores is live whole.
    """

    rotation: Literal["cyclic", "fixed"] = "cyclic"  #: fixed: always the one halfway
    period: Annotated[int, Meta(ge=1, le=10**6)] = 1  #: rounds before the rotation goes on
    whole_head: bool = False  #: all cores of the head are live in every round, as with `FedTT`

    def __post_init__(self) -> None:
        if self.rotation == "fixed" and self.period != 1:
            raise ConfigError("method.period", self.period, "1 with rotation 'fixed', which has no periods")

    def check(self, adapter: AdapterSpec) -> None:
        check_trains(adapter, "fedtt-plus", whole_head=self.whole_head)

    def live(self, adapter: AdapterSpec, round_number: int, state: ServerState | None = None) -> LiveSet:
        """The ends of every train and the one between whose turn it is; all of the head if it is whole.

        Rounds count from 1.
        """
        turn = (round_number - 1) // self.period
        chosen = set(outside_trains(adapter))
        for side, train in sided_trains(adapter):
            if side == "head" and self.whole_head:
                chosen.update(train.indices)
                continue
            ends, between = train.indices[:: len(train.indices) - 1], train.indices[1:-1]
            chosen.update(ends)
            if between:
                place = turn % len(between) if self.rotation == "cyclic" else len(between) // 2
                chosen.add(between[place])
        return LiveSet(adapter.layout, sorted(chosen))
