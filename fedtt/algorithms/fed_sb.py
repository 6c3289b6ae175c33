"""Fed-SB: federated LoRA of which a small square matrix alone is trained.

R. Singhal, K. Ponkshe, R. Vartak, L. R. Varshney, P. Vepakomma. "Fed-SB: A silver bullet for extreme
communication efficiency and performance in (private) federated LoRA fine-tuning". 2025, arXiv 2502.15436.
Adapters: K. Ponkshe, R. Singhal, E. Gorbunov, A. Tumanov, S. Horvath, P. Vepakomma. "Initialization using
update approximation is a silver bullet for extremely efficient low-rank fine-tuning". 2024, arXiv 2411.19557.
Frames: `export.frames`.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from itertools import pairwise
from typing import Annotated

from msgspec import Meta

from fedtt.adapter import AdapterSpec
from fedtt.algorithms.fedavg import FedAvg
from fedtt.algorithms.kind_check import check_kind
from fedtt.errors import ConfigError
from fedtt.layout import LiveSet
from fedtt.server_optimiser import ServerState

__all__ = ["FedSB"]


class FedSB(FedAvg, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True, tag="fed-sb"):
    """R of every B R A and the head are trained, sent and averaged; A and B are the base's.

    B R A is linear in R, so the mean of the R's gives the mean of the devices' matrices exactly (§4), at r²
    numbers each, whatever the model's width.

    With `turns` a round trains and sends a part of them, the same on every device. Round-robin segments
    divide the cohort instead, and average over its parts (H. Liu et al. "EcoLoRA: communication-efficient
    federated fine-tuning of large language models". EMNLP 2025, arXiv 2506.02001, §3.2).
    """

    turns: Annotated[int, Meta(ge=1, le=8)] = 1  #: parts into which the factors are dealt, alike in size
    epoch_rounds: Annotated[int, Meta(ge=1, le=10**6)] = 1  #: rounds that each part is live

    def check(self, adapter: AdapterSpec) -> None:
        check_kind(adapter, "fed-sb", "lora-sb")
        if self.turns > (factors := len(adapter.layout.factors)):
            raise ConfigError(
                "method.turns", self.turns, f"at most {factors}, a factor of these adapters each"
            )

    def live(self, adapter: AdapterSpec, round_number: int, state: ServerState | None = None) -> LiveSet:
        """The R's and the head's factors, or those whose turn a round is; rounds count from 1."""
        parts, epoch = self._parts(adapter), (round_number - 1) // self.epoch_rounds
        first, end = parts[epoch % len(parts)]
        return adapter.layout.live_set(tuple(range(first, end)))

    def _parts(self, adapter: AdapterSpec) -> list[tuple[int, int]]:
        return _even_parts([factor.size for factor in adapter.layout.factors], self.turns)


def _even_parts(sizes: Sequence[int], parts: int) -> list[tuple[int, int]]:
    """Where to cut a row of factors into so many parts, (first, behind the last), none of them empty.

    The largest part is as small as it can be; where fewer parts would do for that, the largest that have
    several factors are cut once more.
    """
    limits = range(max(sizes), sum(sizes) + 1)
    limit = limits[bisect_left(limits, True, key=lambda limit: len(_filled(sizes, limit)) <= parts)]
    found = list(pairwise([*_filled(sizes, limit), len(sizes)]))
    while len(found) < parts:
        first, end = max(
            (part for part in found if part[1] - part[0] > 1), key=lambda p: sum(sizes[slice(*p)])
        )
        at = found.index((first, end))
        (_, cut), _ = _even_parts(sizes[first:end], 2)
        found[at : at + 1] = [(first, first + cut), (first + cut, end)]
    return found


def _filled(sizes: Sequence[int], limit: int) -> list[int]:
    """Where parts begin that are each filled up to the limit."""
    begins, filled = [0], 0
    for index, size in enumerate(sizes):
        if filled + size > limit:
            begins.append(index)
            filled = 0
        filled += size
    return begins
