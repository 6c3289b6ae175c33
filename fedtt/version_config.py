"""What a downloaded version says about itself: `config.json` beside its `factors.safetensors`."""

from __future__ import annotations

from typing import Literal

import msgspec
from msgspec import Struct

from fedtt.adapter import AdapterSpec
from fedtt.errors import BundleError, ConfigError, LayoutError
from fedtt.manifest import FORMAT, Manifest, ModelInfo, check_format
from fedtt.names import Sha256

__all__ = ["CONFIG", "FACTORS", "VersionConfig", "decode_config", "encode_config", "version_config"]

CONFIG = "config.json"
FACTORS = "factors.safetensors"
_LIMIT_BYTES = 1 << 20


class VersionConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Names everything needed to load the factors back into a model."""

    format: Literal[3] = FORMAT
    task_name: str
    version_number: int
    version_sha256: Sha256  #: of theta, float32 little-endian, in the order of the layout
    bundle_sha256: Sha256
    task: Literal["sequence-classification", "causal-lm"]
    model: ModelInfo
    adapter: AdapterSpec
    labels: tuple[str, ...]


def version_config(
    manifest: Manifest, bundle: str, task_name: str, number: int, version: str
) -> VersionConfig:
    return VersionConfig(
        task_name=task_name,
        version_number=number,
        version_sha256=version,
        bundle_sha256=bundle,
        task=manifest.task,
        model=manifest.model,
        adapter=manifest.adapter,
        labels=manifest.labels,
    )


def encode_config(config: VersionConfig) -> bytes:
    return msgspec.json.format(msgspec.json.encode(config), indent=2) + b"\n"


_CONFIG = msgspec.json.Decoder(VersionConfig)  #: made here, as `fedtt.manifest` says why


def decode_config(data: bytes, where: str = CONFIG) -> VersionConfig:
    """Read the config of a version directory; raises BundleError with what is wrong."""
    if len(data) > _LIMIT_BYTES:
        raise BundleError(f"{where} has {len(data)} bytes, at most {_LIMIT_BYTES} are read")
    check_format(data, where, "a version's config")
    try:
        return _CONFIG.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, ConfigError, LayoutError) as error:
        raise BundleError(f"{where} does not describe a version: {error}; download it again") from None
