"""Where the tensors of an ExecuTorch file of weights lie: all within it, or it is refused."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.fuzz_weights import FLOAT32, INT64, Named, data_in, sound_weights, weights_bytes
from fedtt.errors import BundleError
from fedtt.weights_file import StoredData, stored_data

SOUND = sound_weights()
ONE = StoredData(256, 280, FLOAT32, (2, 3))


def test_each_name_has_its_place_type_and_sizes() -> None:
    assert stored_data(SOUND[0], "base.ptd") == {"t0": ONE} == data_in(SOUND[0])
    first, other, last = (512, 536), (640, 645), (768, 776)  # the data from byte 512, in steps of 128
    expected = {
        "t0": StoredData(*first, FLOAT32, (2, 3)),
        "t1": StoredData(*first, FLOAT32, (2, 3)),
        "5c1e": StoredData(*other, None, ()),
        "t2": StoredData(*last, INT64, ()),
    }
    assert stored_data(SOUND[1], "base.ptd") == expected == data_in(SOUND[1])


@pytest.mark.parametrize(
    ("named", "complaint"),
    [
        (Named(key=None), "of the name ''"),
        (Named(key=""), "of the name ''"),
        (Named(key="t\0"), "of the name 't.x00'"),
        (Named(key="t" * 201), "a name of 201 bytes"),
        (Named(segment=1), "'t0' lies in segment 1 of 1"),
        (Named(segment=2**32 - 1), "in segment 4294967295 of 1"),
        (Named(type=None), "'t0' without a type and sizes"),
        (Named(key="5c1e"), "'5c1e' with a type and sizes"),
        (Named(type=99), "'t0' of type 99"),
        (Named(type=12), "'t0' of type 12"),  # quantised, with a scale of its own
        (Named(sizes=None), "without sizes or their order"),
        (Named(order=None), "without sizes or their order"),
        (Named(order=(1, 0)), r"in the order \(1, 0\)"),
        (Named(order=(0,)), r"in the order \(0,\)"),
        (Named(sizes=(1,) * 17, order=range(17)), "a tensor of 17 dimensions"),
        (Named(sizes=(2, 4)), r"'t0' of sizes \(2, 4\) in 24 bytes"),
        (Named(sizes=(2, 2)), r"'t0' of sizes \(2, 2\) in 24 bytes"),
        (Named(type=INT64), r"'t0' of sizes \(2, 3\) in 24 bytes"),
        (Named(sizes=(-2, -3)), "'t0' of a negative size"),
        (Named(sizes=(2**31 - 1,) * 16, order=range(16)), "in 24 bytes"),
    ],
)
def test_a_tensor_that_lies_is_refused(named: Named, complaint: str) -> None:
    with pytest.raises(BundleError, match=f"^base.ptd .*{complaint}.*; download the bundle again$"):
        stored_data(weights_bytes([named], [24]), "base.ptd")


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"starts": [16]}, "a tensor from byte 16 to 40 of 24"),
        ({"starts": [2**64 - 16]}, "a tensor from byte 18446744073709551600 to"),  # which wraps to 8
        ({"starts": [8]}, "a tensor from byte 8"),  # which cannot be read in place
        ({"version": 1}, "version 1 of its tables"),
        ({"length": 39}, "a header of 39 bytes"),
        ({"tables_start": 2**64 - 1}, "tables from byte 18446744073709551615"),
        ({"tables_bytes": 2**64 - 48}, "tables from byte 48 to 18446744073709551616"),
        ({"tables_bytes": 4}, "of its 52"),
        ({"base": 0}, "data from 0 to 24, of 280"),
        ({"base": 384}, "data from 384 to 408, of 280"),
        ({"base": 2**64 - 128}, "data from 18446744073709551488"),
        ({"base": 255, "data_bytes": 25}, "data from byte 255"),
        ({"data_bytes": 23}, "data from 256 to 279, of 280"),
        ({"data_bytes": 2**64 - 1}, "data from 256 to 18446744073709551871, of 280"),
    ],
)
def test_a_header_that_lies_is_refused(changes: dict[str, Any], complaint: str) -> None:
    assert stored_data(weights_bytes([Named()], [24]), "base.ptd") == {"t0": ONE}
    with pytest.raises(BundleError, match=complaint):
        stored_data(weights_bytes([Named()], [24], **changes), "base.ptd")


def test_a_name_that_comes_twice_is_refused() -> None:
    """The runtime takes the first, others may take the last."""
    with pytest.raises(BundleError, match="two of the name 't0'"):
        stored_data(weights_bytes([Named(), Named()], [24]), "base.ptd")


@pytest.mark.parametrize("weights", SOUND, ids=["one", "many"])
def test_every_cut_is_refused(weights: bytes) -> None:
    for size in range(len(weights)):
        with pytest.raises(BundleError, match="no file of weights of fedtt"):
            stored_data(weights[:size], "cut")
    with pytest.raises(BundleError, match="no file of weights of fedtt"):
        stored_data(weights + b"\0", "longer")


@given(st.binary(max_size=80) | st.binary(max_size=90).map(lambda data: data[:4] + b"FT01FH01" + data[12:]))
def test_any_bytes_are_refused(data: bytes) -> None:
    """None so short is a file of weights."""
    with pytest.raises(BundleError):
        stored_data(data, "any")


@given(st.sampled_from(SOUND), st.data())
def test_changed_weights_are_read_as_flatbuffers_reads_them_or_refused(
    weights: bytes, data: st.DataObject
) -> None:
    changed = bytearray(weights)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, 500)) % (len(changed) - 4)
        value = data.draw(st.integers(0, 300) | st.integers(0, 2**32 - 1))
        changed[at : at + 4] = value.to_bytes(4, "little")
    with contextlib.suppress(BundleError):
        found = stored_data(bytes(changed), "any")
        assert found == data_in(bytes(changed))
        assert all(0 <= stored.start <= stored.stop <= len(changed) for stored in found.values())
