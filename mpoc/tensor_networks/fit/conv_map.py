"""Fit an MPO to a convolution as one whole map, and find the kernel nearest to a map.

A small dense map is formed and goes through TT-SVD. For a large one (32×32×64 would be 17 GB), the exact
operator is built in cores, tap by tap, and rounded:

    W_map = Σ_ab S_a ⊗ S_b ⊗ K[a, b]

A shift has bonds of 2 or 3, and each site holds the digits of height, width and channels of its factors. The
trade-off: the exact bonds among the channels are those of all taps together, so rounding costs as much as the
SVDs of the kernel's unfoldings in float64.

A truncated map is still a convolution if no bond lies inside height or width, since the singular vectors at a
bond between axes are sums of shifts. Truncated inside an axis, or trained, it is not a convolution.
"""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

from mpoc.tensor_networks.fit.truncation import DEFAULT_TARGET, Target, Truncation
from mpoc.tensor_networks.fit.tt_svd import Fit, tt_svd
from mpoc.tensor_networks.forms.layout import (
    from_full_taps,
    full_taps,
    map_of_kernel,
    shift_matrices,
    solve_for_taps,
)
from mpoc.tensor_networks.forms.mpo import MPO, add, entropy, kronecker, subtract
from mpoc.tensor_networks.structure import Structure, make_structure

# Relative size of a zero after float64 sums.
_EXACT = 1e-13

AxisFactors = tuple[tuple[tuple[int, int], ...], ...]


def fit_mpo(
    weight: Tensor,
    structure: Structure,
    truncation: Truncation,
    target: Target = DEFAULT_TARGET,
) -> Fit:
    """Factorise a weight, or the whole map of a kernel, as an MPO.

    Arguments and result are those of :func:`mpoc.tensor_networks.fit.tt_svd.tt_svd`; the relative error of a
    whole map is measured against the exact map.
    """
    if not structure.is_large_map:
        return tt_svd(weight, structure, truncation, target)
    exact = exact_map(weight, structure)
    rounded, _ = exact.rounded(truncation.max_bond, truncation.tolerance, truncation.discard)
    stored = MPO([core.to(target.dtype or weight.dtype) for core in rounded.cores], structure)
    norm = exact.norm()
    error = subtract(exact, stored).norm() / norm if norm else 0.0
    spectra = exact.spectra()
    cut = [v if len(v) > kept else None for v, kept in zip(spectra, stored.bonds[1:-1], strict=True)]
    of_weight: list[float | None] = [entropy(values) for values in spectra]
    return Fit(stored, error, rounded.entropies(), of_weight, cut, ["rounded"] * len(spectra))


def exact_map(kernel: Tensor, structure: Structure) -> MPO:
    """The convolution operator itself, in float64, with the smallest bonds.

    Args:
        kernel: (C_out, C_in / groups, k, …).
        structure: a structure of kind ``convmap`` whose factors align with the axes.
    """
    geometry, axis_factors = structure.geometry, structure.axis_factors
    assert geometry is not None and axis_factors is not None
    taps = full_taps(kernel.double(), geometry)
    shifts = _shift_trains(structure, axis_factors, kernel.device)
    terms: list[MPO] = []
    for tap, along_axes in zip(taps, itertools.product(*shifts), strict=True):
        channels = _train(tap, [site[-1] for site in axis_factors])
        terms.append(MPO(kronecker([*along_axes, channels]), structure))
    while len(terms) > 1:
        sums = [add(one, other) for one, other in zip(terms[::2], terms[1::2], strict=False)]
        rest = terms[2 * len(sums) :]
        terms = [total.rounded(structure.full_bond, _EXACT)[0] for total in sums] + rest
    return terms[0]


def _shift_trains(
    structure: Structure, axis_factors: AxisFactors, device: torch.device
) -> list[list[list[Tensor]]]:
    """The shift of each tap along each axis as cores, one per site."""
    geometry = structure.geometry
    assert geometry is not None
    return [
        [
            _train(shift.to(device), [site[axis] for site in axis_factors])
            for shift in shift_matrices(geometry, axis)
        ]
        for axis in range(len(geometry.size))
    ]


def _train(matrix: Tensor, factors: list[tuple[int, int]]) -> list[Tensor]:
    """The exact cores of a float64 matrix with these factors (J, I)."""
    sides = tuple(j for j, _ in factors), tuple(i for _, i in factors)
    structure = make_structure("linear", tuple(matrix.shape), factors=sides)
    return tt_svd(matrix, structure, Truncation(structure.full_bond, _EXACT)).form.cores


def project(form: MPO) -> tuple[Tensor, float]:
    """The kernel nearest to a whole map in Frobenius norm, by least squares.

    Taps that read only padding at this input size are zero.

    Returns:
        The kernel (C_out, C_in / groups, k, …) in the cores' dtype, and the relative error of its map:
        ‖Ŵ − W_map(kernel)‖_F / ‖Ŵ‖_F.
    """
    geometry = form.structure.geometry
    assert geometry is not None
    if form.structure.is_large_map:
        kernel = from_full_taps(solve_for_taps(_tap_sums(form), geometry), geometry)
        norm = form.norm()
        difference = subtract(form, exact_map(kernel, form.structure)).norm()
        return kernel.to(form.cores[0].dtype), difference / norm if norm else 0.0
    kernel = form.to_weight()
    matrix = form.to_matrix()[0].double()
    norm = float(matrix.norm())
    difference = float((matrix - map_of_kernel(kernel.double(), geometry)).norm())
    return kernel, difference / norm if norm else 0.0


def _tap_sums(form: MPO) -> Tensor:
    """⟨S_a ⊗ S_b, Ŵ⟩ for every tap, (taps, C_out, C_in), float64, without forming the map."""
    structure = form.structure
    axis_factors = structure.axis_factors
    assert axis_factors is not None
    channels = [site[-1] for site in axis_factors]
    sides = tuple(j for j, _ in channels), tuple(i for _, i in channels)
    shape = math.prod(sides[0]), math.prod(sides[1])
    split = [_split(core.double(), site) for core, site in zip(form.cores, axis_factors, strict=True)]
    sums: list[Tensor] = []
    shifts = _shift_trains(structure, axis_factors, form.cores[0].device)
    for along_axes in itertools.product(*shifts):
        cores = list(split)
        for train in along_axes:
            cores = [_contract_axis(core, shift) for core, shift in zip(cores, train, strict=True)]
        cores = [core.permute(0, 2, 3, 1) for core in cores]
        sums.append(MPO(cores, make_structure("linear", shape, factors=sides)).to_weight())
    return torch.stack(sums)


def _split(core: Tensor, site: tuple[tuple[int, int], ...]) -> Tensor:
    """(D_left, J, I, D_right) → (D_left, D_right, J_1 I_1, …, J_c, I_c): one axis after another."""
    count = len(site)
    digits = core.reshape(core.shape[0], *(j for j, _ in site), *(i for _, i in site), core.shape[3])
    pairs = [axis for k in range(count) for axis in (1 + k, 1 + count + k)]
    split = digits.permute(0, 2 * count + 1, *pairs)
    for axis in range(2, count + 1):
        split = split.flatten(axis, axis + 1)
    return split


def _contract_axis(core: Tensor, shift: Tensor) -> Tensor:
    """Contract the first axis of (D_left, D_right, J_1 I_1, …) with a shift's core; bonds multiply."""
    product = torch.einsum("lrx...,axb->larb...", core, shift.flatten(1, 2))
    return product.flatten(2, 3).flatten(0, 1)
