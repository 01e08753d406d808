"""An MPO-Net from a dense network: from TT-SVD of its weights, or from random cores.

Random cores keep the nominal D at every bond, even above the sizes of the unfoldings: so do the papers'
parameter counts.  TT-SVD has no use for more than an unfolding's rank, so that its counts can be lower.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mpoc.errors import UsageError
from mpoc.fit.conv_map import exact_map, fit_conv_map
from mpoc.fit.ttsvd import tt_svd
from mpoc.forms.mpo import MPO
from mpoc.nn import adopt
from mpoc.nn.contract import merge
from mpoc.nn.conv_map import geometry_of
from mpoc.reproduce.experiment import Layer
from mpoc.structure import Structure, count_parameters
from mpoc.train.settings import derived_seed

STARTS = ("ttsvd", "random")


def nominal_bonds(sites: int, bond: int) -> tuple[int, ...]:
    """(1, D, …, D, 1)."""
    return (1, *(bond,) * (sites - 1), 1)


def layer_structure(network: nn.Module, layer: Layer) -> Structure:
    """The structure of a layer that is to be replaced.

    Raises:
        UsageError: the factors do not multiply out to the layer's sides. More inputs are allowed to a whole
            map, zeros then follow them.
    """
    module = network.get_submodule(layer.name)
    weight = module.get_parameter("weight")
    geometry = geometry_of(module, layer.size) if layer.size else None
    kind = "convmap" if geometry else "linear"
    structure = Structure(kind, tuple(weight.shape), False, layer.outputs, layer.inputs, geometry)
    rows, columns = structure.padding
    if len(layer.inputs) != len(layer.outputs) or rows or columns < 0 or (columns and geometry is None):
        raise UsageError(
            f"{layer.notation()}: {math.prod(layer.inputs)} inputs and {math.prod(layer.outputs)} outputs, "
            f"but the layer has {structure.inputs} and {structure.outputs}; each site has one factor of each"
        )
    return structure


def num_cores_parameters(structure: Structure, bond: int) -> int:
    """N_mpo of Eq. (6) at the nominal bond."""
    return count_parameters(structure.site_sizes, nominal_bonds(len(structure.site_sizes), bond))


def compress(network: nn.Module, layers: Sequence[Layer], bond: int, start: str, seed: int) -> nn.Module:
    """Put cores in the place of the layers' weights.

    Args:
        network: dense; changed in place. From ``random`` its other parameters stay as they are too.
        layers: which.
        bond: D, of the layers that have none of their own.
        start: ``ttsvd`` or ``random``.
        seed: of the random cores, and of TT-SVD's randomised route.

    Returns:
        The same network.

    Raises:
        UsageError: the factors do not fit.
    """
    for layer in layers:
        structure = layer_structure(network, layer)
        module = network.get_submodule(layer.name)
        own = layer.bond or bond
        if start == "random":
            cores = random_cores(structure, own, derived_seed(seed, "cores", layer.name))
        else:
            cores = fitted_cores(module.get_parameter("weight").detach(), structure, own, seed)
        adopt(module, "weight", cores, structure)
    return network


def random_cores(structure: Structure, bond: int, seed: int) -> list[Tensor]:
    """Normal cores of variance 2 / (fan-in + fan-out), with fans D_{k-1} I_k and J_k D_k.

    Source: Glorot and Bengio 2010, Eq. (12), on each core as the matrix that it is in a contraction from the
    left; what Gao et al. 2020 start from.
    """
    generator = torch.Generator().manual_seed(seed)
    bonds = nominal_bonds(len(structure.site_sizes), bond)
    cores: list[Tensor] = []
    for k, (j, i) in enumerate(zip(structure.output_factors, structure.input_factors, strict=True)):
        a, b = bonds[k], bonds[k + 1]
        deviation = math.sqrt(2 / (a * i + j * b))
        cores.append(torch.randn(a, j, i, b, generator=generator) * deviation)
    return cores


def fitted_cores(weight: Tensor, structure: Structure, bond: int, seed: int) -> list[Tensor]:
    """TT-SVD of a dense weight, of a convolution's whole map where the structure says so."""
    if structure.geometry is None:
        return tt_svd(weight, structure, bond, seed=seed).form.cores
    if structure.is_large_map and structure.axis_factors is None:
        return _crossing_cores(weight, structure, bond)
    return fit_conv_map(weight, structure, bond, seed=seed).form.cores


def _crossing_cores(weight: Tensor, structure: Structure, bond: int) -> list[Tensor]:
    """Of a map too large to be formed, with factors that cross its axes.

    The exact operator is built with prime factors, which never do; neighbouring sites are then merged.

    Raises:
        UsageError: the factors are no products of neighbouring prime ones.
    """
    fine, groups = _prime_structure(structure)
    cores = exact_map(weight, fine).cores
    merged, first = [], 0
    for count in groups:
        merged.append(merge(cores[first : first + count]))
        first += count
    return [core.to(weight.dtype) for core in MPO(merged, structure).rounded(bond)[0].cores]


def _prime_structure(structure: Structure) -> tuple[Structure, list[int]]:
    """The same map at sites of one prime each, and how many of them make each site; J = I at every site."""
    groups = [_primes(factor) for factor in structure.input_factors]
    fine = tuple(prime for group in groups for prime in group)
    found = Structure(structure.kind, structure.shape, False, fine, fine, structure.geometry)
    if structure.output_factors != structure.input_factors or found.axis_factors is None:
        raise UsageError(
            f"a map of {structure.outputs} × {structure.inputs} numbers with these factors cannot be started "
            "from TT-SVD",
            "--starts random",
        )
    return found, [len(group) for group in groups]


def _primes(number: int) -> list[int]:
    """12 → [2, 2, 3]; 1 → [1]."""
    found, prime = [], 2
    while number > 1:
        while number % prime == 0:
            found.append(prime)
            number //= prime
        prime += 1
    return found or [1]
