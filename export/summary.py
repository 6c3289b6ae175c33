"""What a bundle trains, sends and weighs, for people and machines."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

from msgspec import Struct
from torch import nn

from fedtt.adapter import AdapterSpec
from fedtt.codec import CodecSpec, payload_bytes
from fedtt.manifest import Manifest, bundle_digest, encode_manifest

from .base import Base
from .verify import Difference

__all__ = ["Summary", "render", "summarise"]

_LORA_RANK = 8
Format = Literal["fp32", "int8", "int4"]


class Summary(Struct, frozen=True, kw_only=True):
    """The figures of one export."""

    bundle_sha256: str
    model: str
    task: str
    adapted_sites: int  #: sites times blocks
    down_numbers: int  #: trained numbers of one down matrix
    up_numbers: int
    head_numbers: int
    trained_numbers: int
    round_bytes: dict[str, int]  #: payload of one device and round, all factors live, by format
    lora_numbers: int  #: LoRA of rank 8 on query and value of each block, with a dense head
    lora_round_bytes: int  #: the same in fp32
    file_bytes: dict[str, int]
    largest_difference: float | None  #: graph against torch; None where it was not measured


def summarise(manifest: Manifest, base: Base, differences: Sequence[Difference]) -> Summary:
    spec = manifest.adapter
    sites = spec.depth * len(spec.sites)
    lora = _lora_numbers(base, spec)
    return Summary(
        bundle_sha256=bundle_digest(encode_manifest(manifest)),
        model=manifest.model.name,
        task=manifest.task,
        adapted_sites=sites,
        down_numbers=spec.down.size,
        up_numbers=spec.up.size,
        head_numbers=spec.layout.size - sites * (spec.down.size + spec.up.size),
        trained_numbers=spec.layout.size,
        round_bytes={form: _round_bytes(form, spec) for form in get_args(Format)},
        lora_numbers=lora,
        lora_round_bytes=4 * lora,
        file_bytes={name: entry.bytes for name, entry in manifest.files.items()},
        largest_difference=max((d.largest for d in differences), default=None),
    )


def _round_bytes(form: Format, spec: AdapterSpec) -> int:
    return payload_bytes(CodecSpec(quantise=form), spec.layout.everything)


def _lora_numbers(base: Base, spec: AdapterSpec) -> int:
    """r (d_in + d_out) for query and value of every block, and a dense head with its bias."""
    paths = (base.architecture.query, base.architecture.value)
    projections = [block.get_submodule(path) for block in base.blocks for path in paths]
    adapters = sum(
        _LORA_RANK * (p.in_features + p.out_features) for p in projections if isinstance(p, nn.Linear)
    )
    return adapters + (spec.head.labels * (spec.hidden + 1) if spec.head else 0)


def render(summary: Summary) -> str:
    """The figures as a few aligned lines."""
    s = summary
    matrices = f"{s.adapted_sites} sites x (down {s.down_numbers:,} + up {s.up_numbers:,})"
    lines = [
        ("bundle", s.bundle_sha256),
        ("model", f"{s.model}, {s.task}"),
        ("trained", f"{matrices} + head {s.head_numbers:,} = {s.trained_numbers:,} numbers"),
        ("a round", ", ".join(f"{form} {_kb(size)}" for form, size in s.round_bytes.items())),
        (
            "LoRA r=8",
            f"query and value, dense head: {s.lora_numbers:,} numbers, fp32 {_kb(s.lora_round_bytes)}",
        ),
        ("files", ", ".join(f"{name} {_kb(size)}" for name, size in s.file_bytes.items())),
    ]
    if s.largest_difference is not None:
        lines.append(("verified", f"graph and torch differ by at most {s.largest_difference:.1e}"))
    return "\n".join(f"{name:<10}{text}" for name, text in lines)


def _kb(size: int) -> str:
    return f"{size / 1e6:.1f} MB" if size >= 1e6 else f"{size / 1e3:.1f} KB"
