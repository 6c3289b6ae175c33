"""CodecSpec: which stages a task's deltas go through, refused where they do not go together."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta, Struct

from fedtt.codec.quantise import LEVELS, SCALE_BITS
from fedtt.errors import ConfigError

__all__ = ["CodecSpec"]


class CodecSpec(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How a task's deltas travel.

    Error feedback needs a contractive codec: rounding to nearest leaves less of a delta than there was,
    while stochastic rounding may move a number a whole step and let the residual grow.
    """

    quantise: Literal["fp32", "int8", "int4", "int3", "int2", "ternary", "sign", "rms"] = "int4"
    step: Annotated[float, Meta(gt=0, le=8)] = 1.0  #: root mean squares a level of "rms" is wide
    rounding: Literal["nearest", "stochastic"] = "nearest"
    error_feedback: bool = False
    block: Annotated[int, Meta(ge=0, le=2**20)] = 0  #: numbers that share a scale; 0 for a whole factor
    keep: Annotated[float, Meta(gt=0, le=1)] = 1.0  #: part of the live numbers that is sent, the largest
    threshold: Annotated[float, Meta(ge=0, le=8)] = 0.0  #: smaller numbers are not sent, in root mean squares
    coding: Literal["plain", "range"] = "plain"

    def __post_init__(self) -> None:
        exact, plain = self.quantise == "fp32", self.coding == "plain"
        if self.error_feedback and (self.rounding != "nearest" or exact):
            raise ConfigError("codec.error_feedback", True, "only with rounding = 'nearest' and a quantiser")
        if self.step != 1.0 and self.quantise != "rms":
            raise ConfigError("codec.step", self.step, "left out but with quantise = 'rms'")
        if exact and not plain:
            raise ConfigError("codec.coding", self.coding, "'plain' with quantise = 'fp32'")
        if self.quantise in {"sign", "rms"} and plain:
            raise ConfigError(
                "codec.quantise", self.quantise, "only with coding = 'range', without which it is no shorter"
            )
        if self.quantise == "sign" and self.rounding != "nearest":
            raise ConfigError("codec.rounding", self.rounding, "'nearest' with quantise = 'sign'")
        if exact and self.block:
            raise ConfigError("codec.block", self.block, "0 with quantise = 'fp32', which has no scale")
        if (self.keep < 1 or self.threshold) and plain:
            field = "keep" if self.keep < 1 else "threshold"
            allowed = "only with coding = 'range', without which a zero is no shorter than another number"
            raise ConfigError(f"codec.{field}", getattr(self, field), allowed)

    @property
    def levels(self) -> int:
        return LEVELS[self.quantise]

    @property
    def scale_bits(self) -> int:
        return SCALE_BITS.get(self.quantise, 16)
