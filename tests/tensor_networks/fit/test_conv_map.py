"""Whole maps to cores by both routes, and back to kernels."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor, nn

from mpoc.errors import UsageError
from mpoc.tensor_networks.fit.conv_map import exact_map, fit_mpo, project
from mpoc.tensor_networks.fit.truncation import Truncation
from mpoc.tensor_networks.forms.form import Form
from mpoc.tensor_networks.forms.layout import map_of_kernel
from mpoc.tensor_networks.forms.mpo import MPO
from mpoc.tensor_networks.geometry import make_geometry
from mpoc.tensor_networks.structure import Structure, make_structure
from tests.support.checkpoints import relative_error
from tests.support.convolutions import convolutions, geometry_and_kernel, is_fully_known, through_matrix

SOME = settings(max_examples=25, deadline=None, derandomize=True)


def as_mpo(form: Form) -> MPO:
    return MPO(form.cores, form.structure)


@pytest.fixture
def nothing_is_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mpoc.tensor_networks.structure.DENSE_LIMIT", 0)


def map_structure(shape: tuple[int, ...], size: tuple[int, ...], **changes: Any) -> Structure:
    factors = changes.pop("factors", None)
    geometry = make_geometry(shape, size, **changes)
    return make_structure("convmap", shape, factors=factors, geometry=geometry)


def both_routes(kernel: Tensor, structure: Structure, bond: int, **options: Any) -> tuple[Any, Any]:
    truncation = Truncation(bond, **options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mpoc.tensor_networks.structure.DENSE_LIMIT", 0)
        rounded = fit_mpo(kernel, structure, truncation)
        assert rounded.routes == ["rounded"] * (len(structure.site_sizes) - 1)
    dense = fit_mpo(kernel, structure, truncation)
    assert "rounded" not in dense.routes
    return dense, rounded


@pytest.mark.slow
@SOME
@given(convolutions())
def test_both_routes_match_torch_at_full_bond(drawn: tuple[nn.Conv2d, tuple[int, ...]]) -> None:
    conv, size = drawn
    geometry, kernel = geometry_and_kernel(conv, size)
    structure = make_structure("convmap", tuple(kernel.shape), geometry=geometry)
    conv.bias = None
    x = torch.randn(2, conv.in_channels, *size, dtype=torch.float64)
    expected = conv(x).detach()
    for fit in both_routes(kernel.float(), structure, structure.full_bond):
        y = through_matrix(fit.form.to_matrix()[0].double(), x, geometry.output_size)
        assert relative_error(expected, y) < 1e-5
        assert fit.relative_error < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("bond", [1, 3, 6])
def test_both_routes_have_equal_errors(bond: int) -> None:
    structure = map_structure((8, 6, 3, 3), (8, 4), stride=(2, 1), factors=((4, 4, 2, 4), (2, 4, 8, 3)))
    kernel = torch.randn(8, 6, 3, 3)
    exact = map_of_kernel(kernel.double(), structure.geometry)  # type: ignore[arg-type]
    for fit in both_routes(kernel, structure, bond):
        assert max(fit.form.bonds) <= bond
        assert fit.relative_error == pytest.approx(relative_error(exact, fit.form.to_matrix()[0]), rel=1e-5)
    dense, rounded = both_routes(kernel, structure, bond)
    assert rounded.relative_error == pytest.approx(dense.relative_error, rel=0.02)


def test_both_routes_respect_tolerances() -> None:
    structure = map_structure((8, 8, 3, 3), (4, 4))
    for fit in both_routes(torch.randn(8, 8, 3, 3), structure, structure.full_bond, tolerance=0.4):
        assert 0.2 < fit.relative_error <= 0.4


def test_both_routes_respect_discards() -> None:
    structure = map_structure((8, 8, 3, 3), (4, 4))
    cuts = len(structure.site_sizes) - 1
    for fit in both_routes(torch.randn(8, 8, 3, 3), structure, structure.full_bond, discard=0.1):
        assert 0.1 < fit.relative_error**2 <= 1 - 0.9**cuts
        assert max(fit.form.bonds) < structure.full_bond


def test_both_routes_give_equal_entropies() -> None:
    structure = map_structure((4, 4, 3, 3), (4, 4))
    kernel = torch.randn(4, 4, 3, 3, dtype=torch.float64)
    matrix = map_of_kernel(kernel, structure.geometry)  # type: ignore[arg-type]
    _, rounded = both_routes(kernel, structure, 2)
    j, i = structure.output_factors, structure.input_factors
    halves = matrix.reshape(j[0], -1, i[0], matrix.shape[1] // i[0]).transpose(1, 2).reshape(j[0] * i[0], -1)
    p = torch.linalg.svdvals(halves).square()
    p = p[p > 1e-20] / p.sum()
    assert rounded.entropies_of_weight[0] == pytest.approx(float(-(p * p.log()).sum()))
    (spectrum, *_) = rounded.spectra_of_weight
    assert spectrum is not None
    assert spectrum[: len(p)].square() / spectrum.square().sum() == pytest.approx(p, abs=1e-12)


def test_exact_operator_has_the_bonds_of_its_taps() -> None:
    structure = map_structure((8, 8, 3, 3), (16, 16), factors=((4, 4, 4, 4, 8), (4, 4, 4, 4, 8)))
    exact = exact_map(torch.randn(8, 8, 3, 3), structure)
    assert exact.bonds == (1, 3, 3, 9, 9, 1)


@pytest.mark.slow
def test_handles_maps_too_large_to_form(nothing_is_small: None) -> None:
    kernel = torch.randn(16, 8, 3, 3)
    structure = map_structure((16, 8, 3, 3), (128, 128))  # 262,144 × 131,072
    fit = fit_mpo(kernel, structure, Truncation(structure.full_bond))
    assert fit.relative_error < 1e-6
    back, error = project(as_mpo(fit.form))
    assert relative_error(kernel, back) < 1e-5 and error < 1e-5


@pytest.mark.slow
@SOME
@given(convolutions())
def test_projection_needs_no_dense_map(drawn: tuple[nn.Conv2d, tuple[int, ...]]) -> None:
    geometry, kernel = geometry_and_kernel(*drawn)
    structure = make_structure("convmap", tuple(kernel.shape), geometry=geometry)
    form = fit_mpo(kernel, structure, Truncation(structure.full_bond)).form
    noisy = MPO([core + 0.1 * torch.randn_like(core) for core in form.cores], structure)
    dense, dense_error = project(noisy)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mpoc.tensor_networks.structure.DENSE_LIMIT", 0)
        by_cores, error = project(noisy)
        exact_back, exact_error = project(as_mpo(form))
    torch.testing.assert_close(by_cores, dense)
    assert error == pytest.approx(dense_error, abs=1e-9)
    assert exact_error < 1e-9
    if is_fully_known(geometry):
        torch.testing.assert_close(exact_back, kernel)


def test_truncation_between_axes_keeps_a_convolution() -> None:
    kernel = torch.randn(8, 8, 3, 3)
    between = map_structure((8, 8, 3, 3), (4, 4), factors=((4, 8, 4), (4, 8, 4)))
    within = map_structure((8, 8, 3, 3), (4, 4), factors=((2, 8, 8), (2, 8, 8)))
    errors = []
    for structure in (between, within):
        fit = fit_mpo(kernel, structure, Truncation(2))
        assert fit.relative_error > 0.3
        errors.append(project(as_mpo(fit.form))[1])
    assert errors[0] < 1e-5 < 0.05 < errors[1]


def test_large_maps_require_aligned_factors(nothing_is_small: None) -> None:
    with pytest.raises(UsageError, match=r"built from shifts.*outputs 3×8×4, inputs 4×8×3 do not"):
        map_structure((6, 6, 3, 3), (4, 4), factors=((3, 8, 4), (4, 8, 3)))


def test_zero_kernel_gives_zero(nothing_is_small: None) -> None:
    structure = map_structure((4, 4, 3, 3), (4, 4))
    fit = fit_mpo(torch.zeros(4, 4, 3, 3), structure, Truncation(4))
    assert fit.relative_error == 0.0 and set(fit.form.bonds) == {1}
    kernel, error = project(as_mpo(fit.form))
    assert error == 0.0 and not bool(kernel.any())
