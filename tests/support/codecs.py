"""Codecs that between them use every stage."""

from __future__ import annotations

from fedtt.codec import CodecSpec

__all__ = ["CODED", "PLAIN"]

PLAIN = [
    CodecSpec(quantise="fp32"),
    CodecSpec(quantise="int8"),
    CodecSpec(quantise="int4", block=3),
    CodecSpec(quantise="int3"),
    CodecSpec(quantise="int2", rounding="stochastic"),
    CodecSpec(quantise="ternary"),
]
CODED = [
    CodecSpec(quantise="int8", coding="range"),
    CodecSpec(quantise="int4", coding="range", keep=0.25, error_feedback=True),
    CodecSpec(quantise="int3", coding="range", rounding="stochastic"),
    CodecSpec(quantise="ternary", coding="range", block=4),
    CodecSpec(quantise="ternary", coding="range", rounding="stochastic", threshold=0.5),
    CodecSpec(quantise="sign", coding="range"),
    CodecSpec(quantise="rms", coding="range", step=0.5),
]
