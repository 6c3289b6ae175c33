"""Scales: round ticks that hold every value, and units that people read."""

from __future__ import annotations

import math

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from fleet.report.axes import BYTES, NUMBER, SECONDS, SHARE, Unit, scale

FINITE = st.floats(allow_nan=False, allow_infinity=False)
UNITS = st.sampled_from([NUMBER, SHARE, BYTES, SECONDS])


@given(values=st.lists(FINITE), unit=UNITS, from_zero=st.booleans())
@example(values=[1.7976931348623157e308, -1.7976931348623157e308], unit=NUMBER, from_zero=False)
@example(values=[5e-324], unit=BYTES, from_zero=True)
@example(values=[1.0, 1.0 + 2**-52], unit=NUMBER, from_zero=False)
def test_every_value_lies_between_ticks_that_are_few_and_rise(
    values: list[float], unit: Unit, from_zero: bool
) -> None:
    found = scale(values, unit, from_zero=from_zero)
    ticks = [tick for tick, _ in found.ticks]
    assert ticks == sorted(set(ticks))
    assert 2 <= len(ticks) <= 9
    assert all(0 <= found.at(value) <= 1 for value in values)
    assert (found.at(ticks[0]), found.at(ticks[-1])) == (0, 1)
    if from_zero:
        assert found.low <= 0 <= found.high


@given(values=st.lists(st.floats(1e-6, 1e12), min_size=1), unit=UNITS)
def test_on_a_logarithmic_scale_tenfold_is_the_same_way_everywhere(values: list[float], unit: Unit) -> None:
    found = scale(values, unit, log=True)
    assert all(0 <= found.at(value) <= 1 for value in values)
    if found.high > 100 * found.low:
        way = found.at(10 * found.low)
        assert math.isclose(found.at(100 * found.low), 2 * way, rel_tol=1e-6)
        assert len(found.ticks) >= 2


@pytest.mark.parametrize(
    ("values", "unit", "texts", "name"),
    [
        ([0, 60], NUMBER, ["0", "20", "40", "60"], ""),
        ([0, 0.93], SHARE, ["0", "20", "40", "60", "80", "100"], "%"),
        ([0, 7.1e6], BYTES, ["0", "2", "4", "6", "8"], "MB"),
        ([0, 3 * 3600], SECONDS, ["0", "1", "2", "3"], "h"),
        ([0.02, 0.11], NUMBER, ["0.02", "0.04", "0.06", "0.08", "0.10", "0.12"], ""),
    ],
)
def test_ticks_are_round_in_the_unit_that_fits(
    values: list[float], unit: Unit, texts: list[str], name: str
) -> None:
    found = scale(values, unit)
    assert ([text for _, text in found.ticks], found.name) == (texts, name)


@pytest.mark.parametrize(
    ("unit", "value", "text"),
    [
        (BYTES, 0, "0 B"),
        (BYTES, 999, "999 B"),
        (BYTES, 6_840_000, "6.84 MB"),
        (SECONDS, 25_884, "7.19 h"),
        (SHARE, 0.855, "85.5%"),
        (NUMBER, 0.7228, "0.723"),
        (NUMBER, 12_345, "12,345"),
        (NUMBER, 3.21e9, "3.21e+09"),
    ],
)
def test_values_are_written_as_people_read_them(unit: Unit, value: float, text: str) -> None:
    assert unit.text(value) == text


def test_a_tenfold_scale_bears_values_next_to_nothing() -> None:
    tiny = scale([5e-324, 1.0], SECONDS, log=True)
    assert 0.0 <= tiny.at(5e-324) <= tiny.at(1.0) <= 1.0
    assert scale([5e-324], SECONDS, log=True).at(5e-324) == 0.0
