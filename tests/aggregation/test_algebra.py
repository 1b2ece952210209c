# ruff: noqa: N806
# A and B are the factors' names in every LoRA paper and in PEFT.

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedtune.aggregation.algebra import basis_change, best_rank, product, thin_refactor

Shape = tuple[int, int, int]

sides = st.integers(1, 9)
shapes = st.tuples(st.integers(1, 7), sides, sides)  # (rank, d_in, d_out), rank above both sides included
seeds = st.integers(0, 2**32 - 1)


def factors(shape: Shape, seed: int, zero_columns: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rank, d_in, d_out = shape
    generator = np.random.default_rng(seed)
    A, B = generator.standard_normal((rank, d_in)), generator.standard_normal((d_out, rank))
    B[:, : min(zero_columns, rank)] = 0
    return A.astype(np.float32), B.astype(np.float32)


@given(shapes, seeds, st.integers(0, 7))
def test_refactoring_keeps_the_update(shape: Shape, seed: int, zero_columns: int) -> None:
    A, B = factors(shape, seed, zero_columns)
    new_A, new_B = thin_refactor(A, B)
    assert (new_A.shape, new_B.shape) == (A.shape, B.shape)
    np.testing.assert_allclose(product(new_A, new_B), product(A, B), atol=1e-12)


@given(shapes, seeds, st.integers(0, 7))
def test_refactoring_gives_orthonormal_rows_as_far_as_there_is_room(shape: Shape, seed: int, zero_columns: int) -> None:
    A, B = factors(shape, seed, zero_columns)
    rank, d_in, _ = shape
    new_A, _ = thin_refactor(A, B)
    expected = np.diag([1.0] * min(rank, d_in) + [0.0] * max(0, rank - d_in))
    np.testing.assert_allclose(new_A @ new_A.T, expected, atol=1e-12)


@given(shapes, seeds)
def test_refactored_columns_of_b_are_orthogonal_and_fall_like_the_singular_values(shape: Shape, seed: int) -> None:
    A, B = factors(shape, seed)
    _, new_B = thin_refactor(A, B)
    gram = new_B.T @ new_B
    singular = np.linalg.svd(product(A, B), compute_uv=False)
    expected = np.zeros(shape[0])
    expected[: min(len(singular), shape[0])] = singular[: shape[0]]
    np.testing.assert_allclose(gram, np.diag(expected**2), atol=1e-10)


def test_a_zero_b_still_gives_rows_that_training_can_use() -> None:
    A, B = factors((4, 9, 5), seed=1, zero_columns=4)
    new_A, new_B = thin_refactor(A, B)
    assert not new_B.any()
    np.testing.assert_allclose(new_A @ new_A.T, np.eye(4), atol=1e-12)


@given(shapes, seeds, st.integers(0, 7))
def test_the_new_rows_span_what_the_old_rows_spanned(shape: Shape, seed: int, zero_columns: int) -> None:
    A, B = factors(shape, seed, zero_columns)
    new_A, _ = thin_refactor(A, B)
    np.testing.assert_allclose(A @ new_A.T @ new_A, A, atol=1e-5)


@given(shapes, seeds, st.integers(0, 7))
def test_the_basis_change_carries_any_momentum_on_b_along(shape: Shape, seed: int, zero_columns: int) -> None:
    A, B = factors(shape, seed, zero_columns)
    new_A, new_B = thin_refactor(A, B)
    turn = basis_change(A, new_A)
    momentum = np.random.default_rng(seed + 1).standard_normal(B.shape)
    np.testing.assert_allclose((momentum @ turn) @ new_A, momentum @ A, atol=1e-10)
    np.testing.assert_allclose(B @ turn, new_B, atol=1e-10)


@given(shapes, seeds)
def test_the_largest_entry_of_each_row_is_positive(shape: Shape, seed: int) -> None:
    new_A, _ = thin_refactor(*factors(shape, seed))
    rows = new_A[: min(shape[0], shape[1])]
    assert all(row[np.abs(row).argmax()] > 0 for row in rows)


@given(shapes, seeds)
def test_equal_input_gives_equal_bits(shape: Shape, seed: int) -> None:
    once, again = thin_refactor(*factors(shape, seed)), thin_refactor(*factors(shape, seed))
    assert [part.tobytes() for part in once] == [part.tobytes() for part in again]


@given(shapes, st.lists(st.tuples(st.integers(1, 4), st.floats(0.01, 5)), min_size=1, max_size=4), seeds)
def test_the_best_rank_is_the_truncated_svd_of_the_weighted_mean_update(
    shape: Shape, members: list[tuple[int, float]], seed: int
) -> None:
    rank, d_in, d_out = shape
    pairs = [factors((own_rank, d_in, d_out), seed + turn) for turn, (own_rank, _) in enumerate(members)]
    shares = [share for _, share in members]
    dense = sum(share * product(A, B) for share, (A, B) in zip(shares, pairs, strict=True))
    left, singular, right = np.linalg.svd(dense)
    kept = min(rank, len(singular))
    nearest = left[:, :kept] * singular[:kept] @ right[:kept]
    A, B = best_rank([pair[0] for pair in pairs], [pair[1] for pair in pairs], shares, rank)
    assert (A.shape, B.shape) == ((rank, d_in), (d_out, rank))
    error, least = np.linalg.norm(dense - product(A, B)), np.linalg.norm(dense - nearest)
    assert error == pytest.approx(least, abs=1e-9)


def test_every_invertible_mixing_of_the_factors_refactors_to_the_same_pair() -> None:
    A, B = (factor.astype(float) for factor in factors((3, 8, 6), seed=4))
    mixing = np.array([[2.0, 1.0, 0.0], [0.0, -1.0, 3.0], [1.0, 0.0, 1.0]])
    first = thin_refactor(A, B)
    second = thin_refactor(mixing @ A, B @ np.linalg.inv(mixing))
    for one, other in zip(first, second, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-12)
