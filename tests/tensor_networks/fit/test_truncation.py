"""Truncation of one matrix on each route, against numpy's SVD."""

import math
from collections.abc import Callable
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mpoc.tensor_networks.fit import truncation
from mpoc.tensor_networks.fit.truncation import TruncatedSVD, squared_norm, truncate
from tests.support.marks import slow_except

SOME = settings(max_examples=60, deadline=None, derandomize=True)
DTYPES = [torch.float32, torch.float64]
# The Krylov route begins beyond 512; where one side is four times the other it goes by the Gram matrix.
SLOW_SHAPES = (720, 900), (1000, 700), (2080, 520)
SHAPES = [(520, 600), (520, 2080), *(pytest.param(shape, marks=pytest.mark.slow) for shape in SLOW_SHAPES)]

# Singular values from k = 1 on.  "steps" and the ranks put the basis where nothing is left to find.
SPECTRA: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "power": lambda k: 1 / k,
    "slow": lambda k: k**-0.5,
    "fast": lambda k: 0.85**k,
    "steps": lambda k: np.where(k <= 20, 1.0, 1e-3),
    "steep": lambda k: 0.5**k,
    "rank 3": lambda k: 1.0 * (k <= 3),
    "rank 20": lambda k: 1.0 * (k <= 20),
    "rank 40": lambda k: 1.0 * (k <= 40),
}
LARGE = ["gaussian", *(name for name in SPECTRA if name != "steep")]


@cache
def large(spectrum: str, shape: tuple[int, int]) -> tuple[Tensor, np.ndarray]:
    """A float64 matrix and its singular values."""
    random = np.random.default_rng(0)
    if spectrum == "gaussian":
        matrix = random.standard_normal(shape)
        return torch.from_numpy(matrix), np.linalg.svd(matrix, compute_uv=False)
    left, right = (np.linalg.qr(random.standard_normal((side, min(shape))))[0] for side in shape)
    values = SPECTRA[spectrum](np.arange(1.0, min(shape) + 1))
    return torch.from_numpy(left * values @ right.T), values


def small(rows: int, columns: int, rank: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(rows * columns + rank)
    left = torch.randn(rows, rank, generator=generator, dtype=torch.float64)
    return (left @ torch.randn(rank, columns, generator=generator, dtype=torch.float64)).to(dtype)


def rounding(dtype: torch.dtype) -> float:
    return 2e-6 if dtype == torch.float32 else 1e-13


def relative_error(matrix: Tensor, cut: TruncatedSVD) -> float:
    difference = matrix.double() - cut.left.double() @ cut.right.double()
    return float(difference.norm() / matrix.double().norm())


def optimal_error(values: np.ndarray, bond: int) -> float:
    return math.sqrt((values[bond:] ** 2).sum() / (values**2).sum())


def assert_orthonormal(left: Tensor) -> None:
    gram = left.double().T @ left.double()
    torch.testing.assert_close(gram, torch.eye(len(gram), dtype=torch.float64), rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bond", [8, 32])
@pytest.mark.parametrize("spectrum", slow_except(LARGE, "gaussian", "power", "steps"))
def test_krylov_is_within_a_thousandth_of_the_optimum(
    spectrum: str, bond: int, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    exact, values = large(spectrum, shape)
    matrix = exact.to(dtype)
    cut = truncate(matrix, bond, generator=torch.Generator().manual_seed(0))
    assert cut.route == "krylov"
    assert cut.left.shape == (shape[0], bond)
    assert_orthonormal(cut.left)
    error = relative_error(matrix, cut)
    assert error <= 1.001 * optimal_error(values, bond) + rounding(dtype)
    # float32 measures the discarded weight as a difference of norms.
    weight = squared_norm(matrix)
    measured = 1e-6 if dtype == torch.float32 else 1e-13
    assert cut.discarded / weight == pytest.approx(error**2, rel=1e-6, abs=measured)


@pytest.mark.parametrize("shape", [(520, 2080), (2080, 520)])
def test_long_matrices_go_by_the_gram_matrix(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Golub-Kahan is never asked where float32 products resolve the error."""

    def refuse(*_: object) -> None:
        raise AssertionError("Golub-Kahan on a long matrix")

    monkeypatch.setattr(truncation, "_krylov", refuse)
    exact, values = large("gaussian", shape)
    cut = truncate(exact.float(), 8, generator=torch.Generator().manual_seed(0))
    assert cut.route == "krylov"
    assert relative_error(exact.float(), cut) <= 1.001 * optimal_error(values, 8) + rounding(torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("bond", [8, 16, 32])
def test_few_nonzero_rows_are_truncated_optimally(bond: int, transposed: bool, dtype: torch.dtype) -> None:
    matrix, rows = torch.zeros(540, 520, dtype=dtype), small(20, 520, 20, dtype)
    matrix[::27] = rows
    matrix = matrix.T if transposed else matrix
    values = np.linalg.svd(rows.double().numpy(), compute_uv=False)
    cut = truncate(matrix, bond, generator=torch.Generator().manual_seed(0))
    assert_orthonormal(cut.left)
    assert relative_error(matrix, cut) <= 1.001 * optimal_error(values, bond) + rounding(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bond", [12, 16, 32])
def test_errors_near_rounding_are_optimal(bond: int, dtype: torch.dtype) -> None:
    exact, values = large("steep", (520, 600))
    matrix = exact.to(dtype)
    cut = truncate(matrix, bond, generator=torch.Generator().manual_seed(0))
    error = relative_error(matrix, cut)
    assert error <= 1.001 * optimal_error(values, bond) + rounding(dtype)
    assert cut.discarded == pytest.approx(error**2 * squared_norm(matrix), rel=0.02, abs=1e-24)


@pytest.mark.parametrize("bond", [8, 16, 24, 48])
@pytest.mark.parametrize("dtype", DTYPES)
def test_zero_matrix_stays_zero(dtype: torch.dtype, bond: int) -> None:
    cut = truncate(torch.zeros(530, 520, dtype=dtype), bond, generator=torch.Generator().manual_seed(0))
    assert cut.discarded == 0.0
    assert bool((cut.left @ cut.right == 0).all())
    assert_orthonormal(cut.left)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(60, 90), (90, 60)])
def test_exact_route_matches_numpy(shape: tuple[int, int], dtype: torch.dtype) -> None:
    matrix = small(*shape, 60, dtype)
    values = np.linalg.svd(matrix.double().numpy(), compute_uv=False)
    cut = truncate(matrix, 20)
    assert cut.route == "exact" and cut.singular_values is not None
    assert cut.singular_values.dtype == torch.float64
    np.testing.assert_allclose(cut.singular_values.numpy(), values, rtol=1e-5, atol=3e-4 * values[0])
    assert cut.discarded == pytest.approx((values[20:] ** 2).sum(), rel=1e-4)
    assert relative_error(matrix, cut) == pytest.approx(optimal_error(values, 20), rel=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_exact_route_resolves_a_small_tail(dtype: torch.dtype) -> None:
    left, right = (torch.linalg.qr(small(side, 40, 40, torch.float64))[0] for side in (50, 40))
    values = 0.5 ** torch.arange(40, dtype=torch.float64)
    matrix = (left * values @ right.T).to(dtype)
    for bond in (4, 8, 12, 16):
        cut = truncate(matrix, bond)
        assert cut.route == "exact"
        assert relative_error(matrix, cut) == pytest.approx(optimal_error(values.numpy(), bond), rel=1e-3)
        assert math.sqrt(cut.discarded) == pytest.approx(math.sqrt(4 / 3) * 0.5**bond, rel=1e-2)


@SOME
@given(
    st.integers(1, 40), st.integers(1, 40), st.integers(0, 40), st.integers(1, 45), st.sampled_from(DTYPES)
)
def test_any_small_matrix_is_truncated_optimally(
    rows: int, columns: int, rank: int, bond: int, dtype: torch.dtype
) -> None:
    matrix = small(rows, columns, rank, dtype)
    values = np.linalg.svd(matrix.double().numpy(), compute_uv=False)
    cut = truncate(matrix, bond)
    norm = float(np.sqrt((values**2).sum()))
    assert cut.route == ("kept" if bond >= min(rows, columns) else "exact")
    assert cut.left.shape[1] == cut.right.shape[0] <= bond
    assert cut.left.dtype == cut.right.dtype == dtype
    assert_orthonormal(cut.left)
    error = float((matrix.double() - cut.left.double() @ cut.right.double()).norm())
    assert error == pytest.approx(math.sqrt((values[bond:] ** 2).sum()), rel=1e-4, abs=3e-6 * norm)
    assert math.sqrt(cut.discarded) == pytest.approx(error, rel=1e-3, abs=3e-5 * norm)


@SOME
@given(
    st.integers(2, 30),
    st.integers(2, 30),
    st.floats(0.01, 0.99),
    st.integers(1, 30),
    st.sampled_from(DTYPES),
)
def test_tolerance_gives_the_smallest_rank(
    rows: int, columns: int, share: float, bond: int, dtype: torch.dtype
) -> None:
    matrix = small(rows, columns, 30, dtype)
    values = np.linalg.svd(matrix.double().numpy(), compute_uv=False)
    discard = share * float((values**2).sum())
    tails = [(values[rank:] ** 2).sum() for rank in range(len(values) + 1)]
    wanted = next(rank for rank, tail in enumerate(tails) if tail <= discard)
    cut = truncate(matrix, bond, discard)
    assert cut.left.shape[1] == max(1, min(wanted, bond))
    assert cut.discarded <= discard or bond < wanted


@pytest.mark.parametrize("bond", [100, 120])
def test_fallback_from_krylov_is_optimal(bond: int) -> None:
    matrix = torch.randn(400, 330, generator=torch.Generator().manual_seed(0))
    values = np.linalg.svd(matrix.double().numpy(), compute_uv=False)
    cut = truncate(matrix, bond, generator=torch.Generator().manual_seed(0))
    assert relative_error(matrix, cut) <= 1.001 * optimal_error(values, bond)


def test_squared_norm_is_summed_in_float64() -> None:
    tensor = torch.full((3, 100_000), 1.1).T
    assert squared_norm(tensor) == pytest.approx(300_000 * float(tensor[0, 0]) ** 2, rel=1e-12)
    assert squared_norm(torch.zeros(0)) == 0.0


def test_matrix_is_unchanged() -> None:
    for shape, bond in [((40, 30), 5), ((30, 40), 50), ((400, 300), 8)]:
        matrix = small(*shape, 30, torch.float32)
        before = matrix.clone()
        truncate(matrix, bond)
        assert torch.equal(matrix, before)


def test_is_deterministic() -> None:
    matrix = torch.randn(520, 600, generator=torch.Generator().manual_seed(0))
    first, second = (truncate(matrix, 8, generator=torch.Generator().manual_seed(3)) for _ in range(2))
    other = truncate(matrix, 8, generator=torch.Generator().manual_seed(4))
    assert torch.equal(first.left, second.left) and torch.equal(first.right, second.right)
    assert not torch.equal(first.left, other.left)
