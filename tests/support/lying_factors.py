"""Files of factors whose headers lie, or are none."""

from __future__ import annotations

import hashlib
import json
import struct
from pathlib import Path

import pytest

from fedtt.manifest import MANIFEST

__all__ = ["LIES", "entry", "header", "with_first_factors"]


def entry(dtype: str, shape: list[int], start: int, end: int) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def header(*entries: dict[str, object]) -> bytes:
    """A safetensors file up to its data."""
    text = json.dumps({f"t{i}": entry for i, entry in enumerate(entries)}).encode()
    return struct.pack("<Q", len(text)) + text


LIES = [
    pytest.param(b"", id="nothing"),
    pytest.param(b"pickle", id="no safetensors"),
    pytest.param(struct.pack("<Q", 2**63) + b"{}", id="a header of 2^63 bytes"),
    pytest.param(struct.pack("<Q", 1000) + b"{}", id="a header past the end"),
    pytest.param(struct.pack("<Q", 10**5) + b"[" * 10**5, id="a header nested deeply"),
    pytest.param(struct.pack("<Q", 8000) + b'{"a":' + b"[" * 7995, id="an entry nested deeply"),
    pytest.param(struct.pack("<Q", 4) + b"[{}]", id="a header that is a list"),
    pytest.param(struct.pack("<Q", 4) + b'{"\xff', id="a header that is no text"),
    pytest.param(header(entry("F32", [4], 0, 16)), id="data past the end"),
    pytest.param(header(entry("F32", [4], 0, 16)) + bytes(20), id="data that nothing refers to"),
    pytest.param(header(entry("F32", [4], 16, 0)) + bytes(16), id="an end before the start"),
    pytest.param(header(entry("F32", [4], 0, 16), entry("F32", [4], 8, 24)) + bytes(24), id="overlap"),
    pytest.param(header(entry("F32", [2**62, 8], 0, 16)) + bytes(16), id="a shape beyond 64 bits"),
    pytest.param(header(entry("F32", [2**40, 0], 0, 0)), id="a shape of nothing"),
    pytest.param(header(entry("F32", [1] * 65, 0, 4)) + bytes(4), id="more dimensions than arrays have"),
    pytest.param(header(entry("F32", [-2, -2], 0, 16)) + bytes(16), id="a negative shape"),
    pytest.param(header(entry("I64", [2], 0, 16)) + bytes(16), id="integers"),
    pytest.param(header(entry("C64", [4], 0, 32)) + bytes(32), id="complex numbers"),
    pytest.param(header(entry("BF16", [4], 0, 8)) + bytes(8), id="BF16"),
    pytest.param(header(entry("F8_E4M3", [4], 0, 4)) + bytes(4), id="F8_E4M3"),
    pytest.param(header(entry("F8_E8M0", [4], 0, 4)) + bytes(4), id="F8_E8M0"),
    pytest.param(header(entry("F4", [4], 0, 2)) + bytes(2), id="F4"),
]


def with_first_factors(bundle: Path, data: bytes) -> None:
    """Give a bundle these for its first factors, and their sha256 to its manifest."""
    manifest = json.loads((bundle / MANIFEST).read_bytes())
    (bundle / manifest["initial"]).write_bytes(data)
    manifest["files"][manifest["initial"]] = {
        "sha256": hashlib.sha256(data).hexdigest(),
        "bytes": len(data),
    }
    (bundle / MANIFEST).write_text(json.dumps(manifest))
