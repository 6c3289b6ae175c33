"""Factors from safetensors: as that library reads them, and nothing that lies."""

from __future__ import annotations

import contextlib
import json
import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load, save

from fedtt.errors import BundleError, LayoutError
from fedtt.factor_file import decode_factors
from fedtt.layout import Factor, FactorLayout, Theta
from tests.support.lying_factors import LIES, entry, header

LAYOUT = FactorLayout([Factor("b", (2, 3)), Factor("a", (4,)), Factor("c", ())])
THETA = np.arange(LAYOUT.size, dtype=np.float32)
SOUND = save(LAYOUT.unflatten(THETA), metadata={"task": "lights"})


def decoded(data: bytes, layout: FactorLayout = LAYOUT) -> Theta:
    return decode_factors(data, layout, "factors", "download them again")


def test_factors_are_those_that_were_saved() -> None:
    np.testing.assert_array_equal(decoded(SOUND), THETA)
    np.testing.assert_array_equal(decoded(save(LAYOUT.unflatten(THETA))), THETA)


@pytest.mark.parametrize("data", LIES)
def test_what_lies_is_refused_in_one_line_with_the_remedy(data: bytes) -> None:
    with pytest.raises((BundleError, LayoutError), match=r"^factors.*[:;] download them again$") as error:
        decoded(data)
    assert len(str(error.value)) < 400


def test_other_factors_are_named() -> None:
    for data, complaint in (
        (save({"a": THETA[:4]}), r"^factors: factor '[bc]' is missing; download them again$"),
        (header(entry("F32", [4], 0, 16)) + bytes(16), "is not in this layout|is missing"),
        (save(LAYOUT.unflatten(THETA) | {"a": THETA[:4].reshape(2, 2)}), r"'a' has shape \(2, 2\)"),
    ):
        with pytest.raises(LayoutError, match=complaint):
            decoded(data)


@pytest.mark.parametrize("metadata", [{"n": 3}, [], "text", {"a": {"b": "c"}}])
def test_metadata_is_text_by_name(metadata: object) -> None:
    """As safetensors has it, so that no reader takes what another refuses."""
    text = json.dumps({"__metadata__": metadata}).encode()
    with pytest.raises(BundleError, match="is not a safetensors file"):
        decoded(struct.pack("<Q", len(text)) + text)


def test_a_header_is_bounded_by_the_factors_there_are() -> None:
    text = json.dumps({"__metadata__": {"long": "x" * 20_000}}).encode()
    with pytest.raises(BundleError, match="a header of 20030 bytes where at most 17920 can be"):
        decoded(struct.pack("<Q", len(text)) + text)  # 2**14 + 3·512 = 17920


@given(st.data())
def test_changed_files_are_read_as_safetensors_reads_them_or_refused(data: st.DataObject) -> None:
    changed = bytearray(SOUND[: data.draw(st.integers(len(SOUND) - 9, len(SOUND)))])
    for _ in range(data.draw(st.integers(0, 3))):
        changed[data.draw(st.integers(0, len(changed) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(BundleError, LayoutError):
        found = decoded(bytes(changed))
        np.testing.assert_array_equal(found, LAYOUT.flatten(load(bytes(changed))))


@given(st.binary(max_size=80) | st.binary(max_size=80).map(lambda text: struct.pack("<Q", len(text)) + text))
def test_any_bytes_are_read_or_refused(data: bytes) -> None:
    with contextlib.suppress(BundleError, LayoutError):
        decoded(data)
