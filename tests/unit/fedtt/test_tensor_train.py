"""Every function of the algebra against the definition, summed up by slow loops."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtt.errors import LayoutError
from fedtt.tensor_train import (
    Array,
    TTMatrix,
    orthogonalise,
    padded_size,
    plan_modes,
    tt_dense,
    tt_halves,
    tt_matvec,
    tt_round,
    tt_svd,
)

Train = tuple[TTMatrix, list[Array]]
quick = settings(deadline=None, max_examples=40)
_modes = st.lists(st.integers(1, 4), min_size=1, max_size=3).map(tuple)
_matrices = st.builds(TTMatrix, _modes, _modes, st.integers(1, 4))


@st.composite
def trains(draw: st.DrawFn) -> Train:
    """A shape and random float64 cores of that shape."""
    matrix = draw(_matrices)
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    return matrix, [rng.standard_normal(shape) for shape in matrix.core_shapes]


def by_definition(cores: list[Array], split: int) -> Array:
    """W[i, o] = G_1[i_1] ··· G_J[o_{J-s}], entry by entry, row-major multi-indices."""
    modes = [core.shape[1] for core in cores]
    entries = []
    for index in itertools.product(*map(range, modes)):
        product = np.ones((1, 1))
        for core, at in zip(cores, index, strict=True):
            product = product @ core[:, at, :]
        entries.append(product[0, 0])
    return np.array(entries).reshape(math.prod(modes[:split]), -1)


def tails(dense: Array, matrix: TTMatrix) -> list[float]:
    """ε_k: how far the k-th unfolding is from its best approximation of rank r_k."""
    unfoldings = (dense.reshape(math.prod(matrix.modes[:k]), -1) for k in range(1, len(matrix.modes)))
    singular = (np.linalg.svd(u, compute_uv=False) for u in unfoldings)
    return [float(np.linalg.norm(s[r:])) for s, r in zip(singular, matrix.ranks[1:-1], strict=True)]


@given(trains())
@quick
def test_the_dense_matrix_is_that_of_the_definition(train: Train) -> None:
    matrix, cores = train
    np.testing.assert_allclose(
        tt_dense(cores, matrix.split), by_definition(cores, matrix.split), rtol=1e-12, atol=1e-12
    )


@given(trains(), st.lists(st.integers(1, 3), max_size=2))
@quick
def test_multiplying_a_batch_is_multiplying_by_the_dense_matrix(train: Train, batch: list[int]) -> None:
    matrix, cores = train
    x = np.random.default_rng(1).standard_normal((*batch, matrix.d_in))
    product = tt_matvec(cores, x, matrix.split)
    assert product.shape == (*batch, matrix.d_out)
    np.testing.assert_allclose(product, x @ by_definition(cores, matrix.split), rtol=1e-10, atol=1e-10)


@given(trains())
@quick
def test_the_thin_halves_meet_in_the_rank_at_the_split_and_multiply_to_the_matrix(train: Train) -> None:
    matrix, cores = train
    left, right = tt_halves(cores, matrix.split)
    rank = matrix.ranks[matrix.split]
    assert (left.shape, right.shape) == ((matrix.d_in, rank), (rank, matrix.d_out))
    np.testing.assert_allclose(left @ right, by_definition(cores, matrix.split), rtol=1e-12, atol=1e-12)


def test_float32_factors_stay_float32() -> None:
    cores: list[Array] = [np.ones(shape, np.float32) for shape in TTMatrix((2,), (3,), 2).core_shapes]
    assert tt_matvec(cores, np.ones(2, np.float32), 1).dtype == np.float32


@given(_modes, _modes, st.integers(0, 2**32))
@quick
def test_tt_svd_is_exact_at_full_rank(wide: tuple[int, ...], narrow: tuple[int, ...], seed: int) -> None:
    matrix = TTMatrix(wide, narrow, rank=10**6)
    dense = np.random.default_rng(seed).standard_normal((matrix.d_in, matrix.d_out))
    cores = tt_svd(dense, matrix)
    assert tuple(core.shape for core in cores) == matrix.core_shapes
    np.testing.assert_allclose(by_definition(cores, matrix.split), dense, atol=1e-12)


@given(_matrices, st.integers(0, 2**32))
@quick
def test_tt_svd_errs_between_the_worst_bond_and_the_root_of_their_squares(
    matrix: TTMatrix, seed: int
) -> None:
    dense = np.random.default_rng(seed).standard_normal((matrix.d_in, matrix.d_out))
    cores = tt_svd(dense, matrix)
    assert tuple(core.shape for core in cores) == matrix.core_shapes
    error = float(np.linalg.norm(by_definition(cores, matrix.split) - dense))
    epsilons = tails(dense, matrix)
    assert max(epsilons) - 1e-10 <= error <= math.sqrt(sum(e * e for e in epsilons)) + 1e-10


@given(trains())
@quick
def test_tt_svd_finds_a_train_of_its_own_shape_again(train: Train) -> None:
    matrix, cores = train
    dense = tt_dense(cores, matrix.split)
    np.testing.assert_allclose(tt_dense(tt_svd(dense, matrix), matrix.split), dense, atol=1e-9)


def sum_of_two(a: list[Array], b: list[Array]) -> list[Array]:
    """The train of A + B: cores side by side at the ends, block-diagonal between; ranks add."""
    cores = []
    for k, (g, h) in enumerate(zip(a, b, strict=True)):
        r0, n, r1 = np.add(g.shape, h.shape)
        first, last = k == 0, k == len(a) - 1
        core = np.zeros((1 if first else r0, n // 2, 1 if last else r1))
        core[: g.shape[0], :, : g.shape[2]] += g
        core[-h.shape[0] :, :, -h.shape[2] :] += h
        cores.append(core)
    return cores


@given(trains())
@quick
def test_rounding_a_train_that_was_written_with_too_high_ranks_loses_nothing(train: Train) -> None:
    matrix, cores = train
    rounded = tt_round(sum_of_two(cores, cores), matrix.rank)
    assert max(core.shape[2] for core in rounded) <= matrix.rank
    np.testing.assert_allclose(tt_dense(rounded, matrix.split), 2 * tt_dense(cores, matrix.split), atol=1e-9)


@given(trains(), st.integers(1, 3))
@quick
def test_rounding_errs_at_most_by_the_root_of_the_squares_cut_away(train: Train, rank: int) -> None:
    matrix, cores = train
    dense = tt_dense(cores, matrix.split)
    error = float(np.linalg.norm(tt_dense(tt_round(cores, rank), matrix.split) - dense))
    target = TTMatrix(matrix.in_modes, matrix.out_modes, rank)
    assert error <= math.sqrt(sum(e * e for e in tails(dense, target))) + 1e-9


@given(trains(), st.data())
@quick
def test_a_change_of_gauge_keeps_the_matrix_and_makes_all_but_the_centre_orthonormal(
    train: Train, data: st.DataObject
) -> None:
    matrix, cores = train
    centre = data.draw(st.integers(0, len(cores) - 1))
    gauge = orthogonalise(cores, centre)
    np.testing.assert_allclose(
        tt_dense(gauge, matrix.split), tt_dense(cores, matrix.split), rtol=1e-9, atol=1e-9
    )
    for k, core in enumerate(gauge):
        if k < centre:
            np.testing.assert_allclose(np.einsum("anb,anc->bc", core, core), np.eye(core.shape[2]), atol=1e-9)
        if k > centre:
            np.testing.assert_allclose(np.einsum("anb,cnb->ac", core, core), np.eye(core.shape[0]), atol=1e-9)


@given(trains(), st.data())
@quick
def test_a_change_of_the_centre_core_moves_the_matrix_by_its_own_norm(
    train: Train, data: st.DataObject
) -> None:
    matrix, cores = train
    centre = data.draw(st.integers(0, len(cores) - 1))
    gauge = orthogonalise(cores, centre)
    change = np.random.default_rng(2).standard_normal(gauge[centre].shape)
    moved = [core + change if k == centre else core for k, core in enumerate(gauge)]
    distance = np.linalg.norm(tt_dense(moved, matrix.split) - tt_dense(gauge, matrix.split))
    assert distance == pytest.approx(np.linalg.norm(change), rel=1e-9)


@pytest.mark.parametrize(
    ("size", "modes"),
    [
        (384, (8, 8, 6)),
        (768, (12, 8, 8)),
        (1024, (16, 8, 8)),
        (4096, (8, 8, 8, 8)),
        (64, (8, 8)),
        (150, (15, 10)),
        (8, (8,)),
        (1, (1,)),
        (7, (7,)),
        (151, (151, 1)),  # a prime has no other factors; heads are padded to 154 instead
    ],
)
def test_the_modes_of_common_sizes(size: int, modes: tuple[int, ...]) -> None:
    assert plan_modes(size) == modes


@given(st.integers(1, 20_000))
@quick
def test_planned_modes_multiply_to_the_size_and_fall(size: int) -> None:
    modes = plan_modes(size)
    assert math.prod(modes) == size
    assert list(modes) == sorted(modes, reverse=True)
    assert len(modes) == max(1, round(math.log(size, 8)))


@given(st.integers(1, 400))
@quick
def test_no_other_modes_of_the_same_number_have_a_smaller_sum(size: int) -> None:
    modes = plan_modes(size)
    divisors = [d for d in range(1, size + 1) if size % d == 0]
    every = (c for c in itertools.product(divisors, repeat=len(modes)) if math.prod(c) == size)
    assert sum(modes) == min(map(sum, every))


@pytest.mark.parametrize(("size", "padded"), [(4, 4), (150, 150), (151, 154), (2, 2), (17, 24), (1009, 1014)])
def test_a_count_of_labels_is_padded_to_the_next_size_with_short_modes(size: int, padded: int) -> None:
    assert padded_size(size) == padded
    assert max(plan_modes(padded)) <= 16
    assert all(max(plan_modes(n)) > 16 for n in range(size, padded))


def test_the_numbers_of_a_train_are_the_sum_over_its_cores() -> None:
    matrix = TTMatrix((8, 8, 6), (8, 8), rank=5)
    assert (matrix.d_in, matrix.d_out, matrix.split) == (384, 64, 3)
    assert matrix.ranks == (1, 5, 5, 5, 5, 1)
    assert matrix.size == 630  # 1·8·5 + 5·8·5 + 5·6·5 + 5·8·5 + 5·8·1 = 40 + 200 + 150 + 200 + 40


def test_no_rank_exceeds_what_its_two_sides_can_carry() -> None:
    assert TTMatrix((2, 3), (2,), rank=100).ranks == (1, 2, 2, 1)  # min(2, 3·2), min(2·3, 2)


@pytest.mark.parametrize(
    ("wide", "narrow", "rank"), [((), (2,), 1), ((2,), (), 1), ((2, 0), (2,), 1), ((2,), (2,), 0)]
)
def test_a_train_without_modes_or_rank_is_refused(
    wide: tuple[int, ...], narrow: tuple[int, ...], rank: int
) -> None:
    with pytest.raises(LayoutError, match="positive modes and rank"):
        TTMatrix(wide, narrow, rank)


def test_arguments_that_do_not_fit_are_refused_with_both_numbers() -> None:
    cores: list[Array] = [np.ones((1, 2, 2)), np.ones((2, 3, 1))]
    with pytest.raises(LayoutError, match="x has 5 columns, the train takes 2"):
        tt_matvec(cores, np.ones(5), 1)
    for split in (0, 2):
        with pytest.raises(LayoutError, match=f"2 cores, got {split}"):
            tt_dense(cores, split)
    with pytest.raises(LayoutError, match=r"\(2, 3\), got \(3, 2\)"):
        tt_svd(np.ones((3, 2)), TTMatrix((2,), (3,), 1))
    with pytest.raises(LayoutError, match="at least 1, got 0"):
        tt_round(cores, 0)
    with pytest.raises(LayoutError, match="at least 1 to be planned, got 0"):
        plan_modes(0)
