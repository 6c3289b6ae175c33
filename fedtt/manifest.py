"""What is in a bundle: the compiled training step, its base weights and all a device needs beside them.

A bundle is a directory whose `manifest.json` names every other file with its size and sha256. The
bundle's own name is the sha256 of the bytes of that manifest, so one hash covers everything.
"""

from __future__ import annotations

import hashlib
import re
from typing import Annotated, Literal

import msgspec
from msgspec import Meta, Struct

from fedtt.adapter import AdapterSpec
from fedtt.errors import BundleError, ConfigError, LayoutError
from fedtt.names import Sha256, SignatureHex

__all__ = [
    "FORMAT",
    "MANIFEST",
    "MANIFEST_LIMIT_BYTES",
    "DepthGraphs",
    "FileEntry",
    "Graphs",
    "Manifest",
    "ModelInfo",
    "Precision",
    "Products",
    "Tokenization",
    "bundle_digest",
    "check_format",
    "decode_manifest",
    "encode_manifest",
]

FORMAT: Literal[3] = 3  #: 3: graphs by depth, the files of shared weights, the precision of the base
MANIFEST = "manifest.json"
MANIFEST_LIMIT_BYTES = 1 << 20

Precision = Literal["fp32", "fp16", "int8"]  #: in which a base's weights are stored
Products = Literal["fp32", "int8"]  #: in which the frozen matrices of its blocks are multiplied with
TokenCount = Annotated[int, Meta(ge=1, le=2**16)]  #: of one sequence: 8 such rows of ids take 4 MiB
Version = Annotated[str, Meta(max_length=40)]
_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


class FileEntry(Struct, frozen=True, forbid_unknown_fields=True):
    """One file of the bundle."""

    sha256: Sha256
    bytes: Annotated[int, Meta(ge=0, le=1 << 40)]


class ModelInfo(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The frozen base the step was compiled from."""

    name: str  #: as given to export: a hub id or the last part of a directory
    architecture: str  #: `model_type` of its configuration
    base_sha256: Sha256  #: over the base weights as they compute: equal bases give equal gradients
    vocabulary: int
    precision: Precision = "fp32"
    products: Products = "fp32"  #: int8 only of an int8 base


class DepthGraphs(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The training step cut in two, where only the last `depth` blocks and the head are trained.

    prefix: theta (P,), ids (B, S), mask (B, S) -> hidden (B, S, states H) f32: what enters block
    `layers - depth`, and beside it, where that is frozen, too, the output of that block's attention.
    step: theta (P,), hidden, mask (B, S)[, ids (B, S) for causal-lm][, labels (B,)] -> loss (),
    grad (P,), zero for factors of blocks below the cut. Prefix reads those alone of theta, step all others.
    """

    depth: Annotated[int, Meta(ge=0, le=2**10)]
    prefix: str
    step: str
    states: Annotated[int, Meta(ge=1, le=2)] = 1


class Graphs(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The graphs of one runtime, as file names; all read the same external base weights.

    step: theta (P,) f32, ids (B, S) i64, mask (B, S) i64[, labels (B,) i64] -> loss () f32, grad (P,) f32.
    eval: the same inputs but labels -> logits (B, C) f32, or for causal-lm (B, S, V) f32.
    The loss is the mean over examples (classification) or over predicted tokens (causal-lm).
    private: the step's inputs, live (P,) f32, clip () f32 -> loss () f32, grad (P,) f32: the mean over
    examples of the gradients of their own losses where live is 1, each scaled down to the norm clip.
    """

    step: str
    eval: str
    weights: tuple[
        str, ...
    ]  #: the files of weights that the graphs read beside their own: base.bin, base.ptd
    depths: tuple[DepthGraphs, ...] = ()  #: rising, none deeper than the adapter
    private: str | None = None  #: the step that clips each example's gradient, where the bundle has one
    rows: Annotated[int, Meta(ge=1)] | None = None  #: most rows of a batch, where the runtime plans for them

    @property
    def files(self) -> tuple[str, ...]:
        """All that this runtime reads."""
        cut = (name for graphs in self.depths for name in (graphs.prefix, graphs.step))
        private = () if self.private is None else (self.private,)
        return (self.step, self.eval, *private, *cut, *self.weights)


class Tokenization(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How text becomes ids: a `tokenizers` JSON file, cut to `max_tokens`, padded with `pad_id`."""

    file: str
    pad_id: Annotated[int, Meta(ge=0, lt=2**31)]
    min_tokens: TokenCount  #: shortest sequence the graphs take; shorter batches are padded to it
    max_tokens: TokenCount  #: longest


class Manifest(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The contents of `manifest.json`."""

    format: Literal[3] = FORMAT
    task: Literal["sequence-classification", "causal-lm"]
    model: ModelInfo
    adapter: AdapterSpec
    layout_sha256: Sha256  #: `adapter.layout.digest`, so that a reader who plans otherwise notices
    labels: tuple[str, ...]  #: names in order of their index; empty for causal-lm
    tokenization: Tokenization
    graphs: dict[Literal["onnxruntime", "executorch"], Graphs]
    opset: int
    requires: dict[str, Version]  #: runtime package -> least version
    initial: str  #: safetensors file with the first factors
    files: dict[str, FileEntry]
    signature: SignatureHex | None = None  #: see `fedtt.release`


#: Made here and not at first use: two threads that make msgspec learn a type at once crash it (0.22).
_MANIFEST = msgspec.json.Decoder(Manifest)


def encode_manifest(manifest: Manifest) -> bytes:
    """The canonical bytes of a manifest: keys in the order of the type, two spaces of indentation."""
    return msgspec.json.format(msgspec.json.encode(manifest), indent=2) + b"\n"


def decode_manifest(data: bytes, where: str = MANIFEST) -> Manifest:
    """Read and check a manifest; raises BundleError with what is wrong and what to do.

    It takes at most 24 times the bytes of memory, and 2 KiB for each of the adapter's factors.
    """
    if len(data) > MANIFEST_LIMIT_BYTES:
        raise BundleError(f"{where} has {len(data)} bytes, at most {MANIFEST_LIMIT_BYTES} are read")
    check_format(data, where, "a bundle manifest")
    try:
        manifest = _MANIFEST.decode(data)
        _check(manifest, where)
    except (msgspec.DecodeError, UnicodeDecodeError, ConfigError, LayoutError) as error:
        raise BundleError(f"{where} is not a valid manifest: {error}; export it again") from None
    return manifest


def check_format(data: bytes, where: str, what: str) -> None:
    """Refuse bytes that are no JSON object of this format, whatever else is in them; raises BundleError."""
    try:
        found = msgspec.json.decode(data, type=dict[str, msgspec.Raw])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BundleError(f"{where} is not {what}: {error}; export or download it again") from None
    if bytes(found.get("format", b"")) != str(FORMAT).encode():
        version = bytes(found.get("format", b"none")).decode(errors="replace")[:20]
        raise BundleError(
            f"{where} has format {version}, this program reads format {FORMAT}: "
            "export or download it again, or use the release of fedtt that wrote it"
        )


def _check(manifest: Manifest, where: str) -> None:
    for name in manifest.files:
        if not _FILE_NAME.fullmatch(name) or name == MANIFEST:
            raise BundleError(f"{where} names a file {name[:100]!r}; names are plain, without directories")
    named = {manifest.initial, manifest.tokenization.file}
    named.update(name for graphs in manifest.graphs.values() for name in graphs.files)
    if missing := named - manifest.files.keys():
        raise BundleError(f"{where} does not list {min(missing)!r} among its files")
    for graphs in manifest.graphs.values():
        _check_depths(graphs, manifest.adapter, where)
    if manifest.adapter.layout.digest != manifest.layout_sha256:
        raise BundleError(f"{where} describes another factor layout than its adapter has; export it again")
    if manifest.adapter.head and len(manifest.labels) != manifest.adapter.head.labels:
        raise BundleError(
            f"{where} names {len(manifest.labels)} labels, its head has {manifest.adapter.head.labels}"
        )


def _check_depths(graphs: Graphs, adapter: AdapterSpec, where: str) -> None:
    depths = [cut.depth for cut in graphs.depths]
    least, most = min(1, adapter.depth), min(adapter.depth, adapter.layers - 1)
    if depths != sorted(set(depths)) or any(not least <= depth <= most for depth in depths):
        raise BundleError(
            f"{where} has graphs of the depths {depths}; they rise, from {least} to {most} for its adapter"
        )


def bundle_digest(manifest_bytes: bytes) -> str:
    """The name of a bundle: sha256 of its manifest's bytes."""
    return hashlib.sha256(manifest_bytes).hexdigest()
