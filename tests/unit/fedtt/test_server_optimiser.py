"""Server optimisers against the papers' lines, number by number, and the state they keep between folds."""

from __future__ import annotations

import math
from contextlib import suppress
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from fedtt.errors import LayoutError, WireError
from fedtt.layout import Factor, FactorLayout, LiveSet
from fedtt.server_optimiser import (
    ServerSpec,
    ServerState,
    decode_state,
    encode_state,
    published,
    server_update,
)
from tests.support.fold_oracle import one_number

LAYOUT = FactorLayout([Factor("a", (2,)), Factor("b", (3,)), Factor("c", (1,))])
ALL = LAYOUT.everything
SPECS = [
    ServerSpec(),
    ServerSpec(learning_rate=0.3),
    ServerSpec(optimiser="momentum"),
    ServerSpec(optimiser="momentum", momentum=0.5, learning_rate=0.1),
    ServerSpec(optimiser="adam"),
    ServerSpec(optimiser="adam", momentum=0.0, second_moment=0.9, adaptivity=0.1, learning_rate=0.5),
    ServerSpec(optimiser="yogi"),
    ServerSpec(optimiser="yogi", momentum=0.5, second_moment=0.5, adaptivity=0.01, learning_rate=2.0),
]
specs = pytest.mark.parametrize("spec", SPECS, ids=lambda s: f"{s.optimiser} {s.rate:g}")
numbers = st.floats(-100, 100)
folds = st.lists(st.lists(numbers, min_size=6, max_size=6), min_size=1, max_size=6)


def start() -> Any:
    return np.linspace(-1, 1, LAYOUT.size).astype(np.float32)


def ours(spec: ServerSpec, deltas: list[list[float]], live: LiveSet = ALL) -> tuple[Any, ServerState]:
    theta, state = start(), None
    for delta in deltas:
        theta, state = server_update(spec, theta, live, np.array(delta[: live.size]), state)
    assert state is not None
    return theta, state


@specs
@settings(deadline=None, max_examples=50)
@given(deltas=folds)
def test_every_number_goes_the_papers_way(spec: ServerSpec, deltas: list[list[float]]) -> None:
    found, _ = ours(spec, deltas)
    columns = zip(*deltas, strict=True)
    expected = [float(x) + sum(one_number(spec, c)) for x, c in zip(start(), columns, strict=True)]
    largest = max(1.0, *(abs(x) for x in expected))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5 * largest)


@given(st.lists(numbers, min_size=6, max_size=6))
def test_plain_averaging_adds_the_delta(delta: list[float]) -> None:
    found, state = ours(ServerSpec(), [delta])
    assert found.tolist() == (start() + np.array(delta)).astype(np.float32).tolist()
    assert state.first.size == state.second.size == 0


@specs
@given(
    deltas=folds,
    factors=st.sets(st.integers(0, 2), min_size=1, max_size=2).map(sorted),
)
@settings(deadline=None, max_examples=25)
def test_what_is_not_live_keeps_its_bits_in_theta_and_in_the_moments(
    spec: ServerSpec, deltas: list[list[float]], factors: list[int]
) -> None:
    live = LiveSet(LAYOUT, factors)
    theta, before = ours(spec, deltas)
    moved, after = server_update(spec, theta, live, np.array(deltas[0][: live.size]), before)
    still = np.setdiff1d(np.arange(LAYOUT.size), live.positions)
    assert moved[still].tobytes() == theta[still].tobytes()
    for old, new in ((before.first, after.first), (before.second, after.second)):
        if old.size:
            assert new[still].tobytes() == old[still].tobytes()
    idle = [i for i in range(3) if i not in factors]
    assert after.norms[idle].tolist() == before.norms[idle].tolist()


@pytest.mark.parametrize("optimiser", ["adam", "yogi"])
@given(delta=st.lists(st.floats(-1e15, 1e15), min_size=6, max_size=6))
def test_the_first_fold_of_an_adaptive_optimiser_moves_no_number_by_more_than_its_rate(
    optimiser: Any, delta: list[float]
) -> None:
    """η (1 - β₁) |Δ| / (√v + τ), v ≥ (1 - β₂) Δ², β₁ = 0.9, β₂ = 0.99."""
    spec = ServerSpec(optimiser=optimiser)
    assert spec.rate == 0.01
    found, _ = ours(spec, [delta])
    assert np.abs(found - start()).max() <= 0.01 * (1 + 1e-3)


@given(folds)
def test_yogis_second_moment_stays_positive_and_moves_by_a_bounded_step(deltas: list[list[float]]) -> None:
    spec, state = ServerSpec(optimiser="yogi"), None
    theta, before = start(), np.full(6, 1e-6)
    for delta in deltas:
        theta, state = server_update(spec, theta, ALL, np.array(delta), state)
        assert (state.second >= 0).all()
        step = (1 - spec.second_moment) * np.array(delta) ** 2
        assert (np.abs(state.second - before) <= step * (1 + 1e-4) + 1e-6 * before + 1e-12).all()
        before = state.second.astype(np.float64)


@specs
@given(deltas=folds)
@settings(deadline=None, max_examples=25)
def test_folds_of_nothing_leave_a_fresh_model_alone(spec: ServerSpec, deltas: list[list[float]]) -> None:
    found, state = ours(spec, [[0.0] * 6 for _ in deltas])
    assert found.tobytes() == start().tobytes()
    assert state.norms.tolist() == [0.0, 0.0, 0.0]


def test_the_norm_of_each_factors_last_fold_is_kept() -> None:
    _, state = ours(ServerSpec(), [[3.0, 4.0, 9.0]], LiveSet(LAYOUT, [0, 2]))
    assert state.norms.tolist() == pytest.approx([5.0, math.nan, 9.0], nan_ok=True)


def test_a_norm_beyond_float32_is_kept_as_the_greatest_there_is() -> None:
    greatest = float(np.finfo(np.float32).max)
    _, state = ours(ServerSpec(), [[greatest / 2] * 6])
    assert state.norms.tolist() == pytest.approx([greatest / 2**0.5, greatest * 3**0.5 / 2, greatest / 2])
    _, state = ours(ServerSpec(), [[greatest / 1.5] * 6])
    assert state.norms.tolist()[1] == greatest
    assert state.is_finite


# the state


def vectors(size: int, **limits: Any) -> st.SearchStrategy[Any]:
    return st.lists(st.floats(width=32, **limits), min_size=size, max_size=size).map(
        lambda v: np.array(v, np.float32)
    )


states = st.builds(
    ServerState, first=vectors(6) | vectors(0), second=vectors(6) | vectors(0), norms=vectors(3)
)


def bits(state: ServerState) -> list[bytes]:
    return [vector.tobytes() for vector in (state.first, state.second, state.norms)]


@given(states)
def test_a_state_comes_back_bit_for_bit(state: ServerState) -> None:
    data = encode_state(state)
    found = decode_state(data)
    assert bits(found) == bits(state)
    assert encode_state(found) == data


@specs
def test_a_state_that_was_stored_between_folds_gives_the_same_bits(spec: ServerSpec) -> None:
    deltas = np.random.default_rng(5).normal(size=(4, 6)).tolist()
    theta, state = start(), None
    for delta in deltas:
        theta, state = server_update(spec, theta, ALL, np.array(delta), state)
        state = decode_state(encode_state(state))
    assert theta.tobytes() == ours(spec, deltas)[0].tobytes()


SOUND = encode_state(ours(ServerSpec(optimiser="adam"), [[1.0] * 6])[1])


@given(st.binary(max_size=200) | st.integers(0, len(SOUND) - 1).map(lambda end: SOUND[:end]))
@example(msgspec.msgpack.encode([b"abc", b"", b""]))
@example(msgspec.msgpack.encode([b"", b""]))
@example(msgspec.msgpack.encode(["", "", ""]))
@example(SOUND + b"\0")
@example(b"\xdd\xff\xff\xff\xff")  # an array of 2^32 - 1
def test_any_bytes_are_a_state_that_is_written_just_so_or_refused(data: bytes) -> None:
    with suppress(WireError):
        assert encode_state(decode_state(data)) == data


def test_bytes_cut_short_or_of_another_kind_are_never_taken() -> None:
    for data in (b"", SOUND[:-1], SOUND + b"\0", msgspec.msgpack.encode([b"abc", b"", b""])):
        with pytest.raises(WireError, match=r"^a stored server state cannot be read: [^\n]+$"):
            decode_state(data)


@pytest.mark.parametrize("optimiser", ["momentum", "adam", "yogi"])
def test_a_state_of_another_layout_or_optimiser_is_refused(optimiser: Any) -> None:
    spec = ServerSpec(optimiser=optimiser)
    _, plain = ours(ServerSpec(), [[1.0] * 6])
    with pytest.raises(LayoutError):
        server_update(spec, start(), ALL, np.ones(6), plain)


def test_a_state_that_later_folds_could_not_build_on_says_so() -> None:
    _, state = ours(ServerSpec(optimiser="adam"), [[1.0] * 6])
    assert state.is_finite
    first_fold = replace(state, norms=np.full(3, np.nan, np.float32))
    assert first_fold.is_finite
    for name in ("first", "second"):
        damaged = getattr(state, name).copy()
        damaged[0] = np.inf
        assert not replace(state, **{name: damaged}).is_finite


@specs
def test_what_is_published_with_few_places_is_the_nearest_multiple(spec: ServerSpec) -> None:
    delta = np.random.default_rng(0).normal(size=LAYOUT.size)
    exact, _ = server_update(spec, start(), ALL, delta, None)
    few = replace(spec, binary_places=5)
    rounded, _ = server_update(few, published(few, start()), ALL, delta, None)
    multiples = rounded.astype(np.float64) * 32
    np.testing.assert_array_equal(multiples, np.rint(multiples))
    assert np.abs(rounded - exact).max() <= 2 / 64 + 1e-6  # of the base and of the fold, each half of 1/32
    assert published(few, np.array([-0.01, 0.02])).tobytes() == np.array([0, 1 / 32], "<f4").tobytes(), (
        "no -0"
    )
