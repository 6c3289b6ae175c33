"""Sound inputs from which `benchmarks.fuzz` begins."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import numpy as np
import onnx
from msgspec.structs import replace
from safetensors.numpy import save

from benchmarks.bundles import bundle_of
from fedtt.algorithms.fedtt import FedTT
from fedtt.codec import CodecSpec
from fedtt.label_counts import encode_label_counts
from fedtt.layout import FactorLayout
from fedtt.manifest import MANIFEST, bundle_digest, decode_manifest
from fedtt.messages import (
    AsTold,
    CheckIn,
    Code,
    Enroll,
    Enrolled,
    Failure,
    FailureCode,
    Judged,
    Message,
    Plan,
    Problem,
    Receipt,
    UpdateState,
    Verdict,
    Wait,
    Work,
    encode,
)
from fedtt.optimiser import TrainingSpec
from fedtt.version_config import encode_config, version_config
from fedtt.wire import UpdateHeader, encode_update

__all__ = [
    "LABELS",
    "sound_config",
    "sound_factors",
    "sound_graphs",
    "sound_manifest",
    "sound_messages",
    "sound_tokenizers",
    "sound_updates",
]

LABELS = 4  #: of which an update may bring counts


def sound_updates() -> tuple[bytes, ...]:
    """Frames without and with counts of `LABELS` labels."""
    header = UpdateHeader(layout=bytes(8), examples=3, steps=2, loss_first=1.0, loss_last=0.5)
    counted = replace(header, label_counts=encode_label_counts([3, -1, 0, 2]))
    return tuple(encode_update(h, b"payload") for h in (header, counted))


def sound_messages() -> tuple[bytes, ...]:
    """One of most kinds."""
    judged = Judged(loss=0.5, right=2)
    plan = Plan(
        task="t",
        seed=1,
        bundle="0" * 64,
        version="0" * 64,
        version_number=0,
        round=1,
        live=(0, 1),
        training=TrainingSpec(),
        codec=CodecSpec(),
        method=FedTT(),
        min_examples=1,
    )
    sound: list[Message] = [
        Enroll(public_key=bytes(32), token="t" * 8, client="c"),
        Enrolled(device="0" * 32, release_key=bytes(32)),
        CheckIn(client="c", runtimes=("onnxruntime",), examples=3),
        AsTold(digest=bytes(4)),
        Verdict(examples=3, before=judged, after=judged),
        Failure(code=FailureCode.MEMORY),
        Receipt(lease="0" * 32, digest="0" * 64, state=UpdateState.FOLDED, version_number=1),
        Wait(retry_after_s=3.0),
        Work(lease="0" * 32, expires_in_s=60.0, plan=plan),
        Problem(code=Code.BUSY, detail="d"),
    ]
    return tuple(map(encode, sound))


def sound_factors(layout: FactorLayout) -> tuple[bytes, ...]:
    """With metadata and without."""
    named = layout.unflatten(np.arange(layout.size, dtype=np.float32))
    return save(named), save(named, metadata={"format": "fedtt"})


def sound_manifest() -> bytes:
    """Of a bundle of forty numbers."""
    with tempfile.TemporaryDirectory() as directory:
        bundle_of(Path(directory), 40)
        return (Path(directory) / MANIFEST).read_bytes()


def sound_config() -> bytes:
    """Of a version over the same bundle."""
    data = sound_manifest()
    return encode_config(version_config(decode_manifest(data), bundle_digest(data), "t", 1, "0" * 64))


def sound_tokenizers() -> tuple[bytes, ...]:
    """One of each model, with what BERT's and Llama's have around theirs."""
    special = {"id": "a", "ids": [0], "tokens": ["a"]}
    text = {"Sequence": {"id": "A", "type_id": 0}}
    pieces: list[dict[str, object]] = [
        {
            "normalizer": {
                "type": "BertNormalizer",
                "clean_text": True,
                "handle_chinese_chars": True,
                "strip_accents": None,
                "lowercase": True,
            },
            "pre_tokenizer": {"type": "BertPreTokenizer"},
            "model": {
                "type": "WordPiece",
                "unk_token": "a",
                "continuing_subword_prefix": "##",
                "max_input_chars_per_word": 100,
                "vocab": {"a": 0, "##b": 1},
            },
            "post_processor": {
                "type": "TemplateProcessing",
                "single": [{"SpecialToken": {"id": "a", "type_id": 0}}, text],
                "pair": [text, {"Sequence": {"id": "B", "type_id": 1}}],
                "special_tokens": {"a": special},
            },
        },
        {
            "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "_"},
            "model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": ["a b"]},
            "decoder": {"type": "ByteFallback"},
        },
        {
            "pre_tokenizer": {"type": "Metaspace", "replacement": "_"},
            "model": {"type": "Unigram", "unk_id": 0, "vocab": [["a", 0.0], ["b", -1.5]]},
        },
        {
            "added_tokens": [
                {"id": 1, "content": "[b]", "special": True}
                | dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
            ],
            "pre_tokenizer": {
                "type": "Split",
                "pattern": {"Regex": "\\s+"},
                "behavior": "Removed",
                "invert": False,
            },
            "model": {"type": "WordLevel", "vocab": {"a": 0, "[b]": 1}, "unk_token": "a"},
        },
    ]
    return tuple(json.dumps({"version": "1.0", **piece}).encode() for piece in pieces)


def sound_graphs() -> tuple[bytes, ...]:
    """Weights of an initializer and of a Constant in a file beside; nested graphs."""
    inner = onnx.GraphProto(name="inner", node=[onnx.helper.make_node("Add", ["x", "x"], ["y"])])
    tensor = onnx.TensorProto(name="w", data_type=1, dims=[4], data_location=onnx.TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value="base.bin")
    nodes = [
        onnx.helper.make_node("MatMul", ["x", "w"], ["z"]),
        onnx.helper.make_node("If", ["c"], ["y"], then_branch=inner, else_branch=inner),
    ]
    constant = onnx.helper.make_node("Constant", [], ["w"], value=tensor)
    graphs = (
        onnx.GraphProto(name="g", node=nodes, initializer=[tensor]),
        onnx.GraphProto(name="g", node=[constant, nodes[0]]),
    )
    return tuple(onnx.ModelProto(ir_version=10, graph=graph).SerializeToString() for graph in graphs)
