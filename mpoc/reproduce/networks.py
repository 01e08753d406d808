"""A network with cores in place of dense weights: from TT-SVD of the weights, or from random cores.

Random cores keep the nominal D at every bond, even above the size of the unfolding, as the parameter counts
of the papers do.  TT-SVD keeps at most the rank of an unfolding, so that its counts can be lower.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mpoc.errors import UsageError
from mpoc.models import zoo
from mpoc.models.zoo.cifar import FEATURES
from mpoc.nn import adopt
from mpoc.nn.conv_map import geometry_of
from mpoc.reproduce.experiment import RANDOM, RESCALED, Experiment, ReplacedLayer
from mpoc.runtime.device import derived_seed
from mpoc.tensor_networks.factors import InputOrder, permutation
from mpoc.tensor_networks.fit.conv_map import fit_mpo
from mpoc.tensor_networks.fit.mera import orthogonal_cores
from mpoc.tensor_networks.fit.truncation import Target, Truncation
from mpoc.tensor_networks.forms.form import Form, form_of
from mpoc.tensor_networks.forms.mpo import MPO, rank_within
from mpoc.tensor_networks.structure import Structure
from mpoc.tensor_networks.topology import CHAIN, MERA

FULL_BOND = 1 << 30  # no cap


def nominal_bonds(sites: int, bond: int) -> tuple[int, ...]:
    """(1, D, …, D, 1)."""
    return (1, *(bond,) * (sites - 1), 1)


def layer_structure(network: nn.Module, layer: ReplacedLayer) -> Structure:
    """The structure of a layer that is to be replaced.

    Raises:
        UsageError: the factors do not multiply out to the layer's sides (a whole map may have more inputs,
            zeros then follow them), or do not align with the axes of a map too large to be formed.
    """
    module = network.get_submodule(layer.name)
    weight = module.get_parameter("weight")
    geometry = geometry_of(module, layer.size) if layer.size else None
    kind = "convmap" if geometry else "linear"
    sides, order = (layer.outputs, layer.inputs), _order(layer, weight.shape[1])
    structure = Structure(kind, tuple(weight.shape), False, *sides, geometry, layer.form, order)
    rows, columns = structure.padding
    if len(layer.inputs) != len(layer.outputs) or rows or columns < 0 or (columns and geometry is None):
        raise UsageError(
            f"{layer.notation()}: {math.prod(layer.inputs)} inputs and {math.prod(layer.outputs)} outputs, "
            f"but the layer has {structure.inputs} and {structure.outputs}; each site has one factor of each"
        )
    if structure.is_large_map and structure.axis_factors is None:
        raise UsageError(
            f"{layer.notation()}: in so large a map each factor must divide an axis or span whole ones"
        )
    return structure


def _order(layer: ReplacedLayer, inputs: int) -> InputOrder:
    """The order of a layer's inputs, as in its structure."""
    if layer.order == "channels":
        return channel_order(*FEATURES)
    side = math.isqrt(inputs)
    return "" if layer.order == "raster" else f"morton:{side}x{side}"


def channel_order(height: int, width: int, channels: int) -> tuple[int, ...]:
    """The number that a feature has pixel by pixel, channels last, of each feature with channels first.

    Pixels are then in Morton order; height and width are one power of two.
    """
    factors = (4,) * (height.bit_length() - 1)
    pixels = permutation(f"morton:{height}x{width}", height * width, factors) or ()
    return tuple(pixel * channels + channel for channel in range(channels) for pixel in pixels)


def check_structures(experiment: Experiment) -> None:
    """Whether all layers of an experiment can be replaced as it says; no weights are made.

    Raises:
        UsageError: as :func:`layer_structure`.
    """
    with torch.device("meta"):
        network = zoo.make(experiment.network)
    for layer in experiment.layers:
        layer_structure(network, layer)


def num_cores_parameters(structure: Structure, bond: int) -> int:
    """N_mpo of Eq. (6) at the nominal bond."""
    if structure.topology is CHAIN:
        return structure.count(nominal_bonds(len(structure.site_sizes), bond))
    return structure.num_parameters(bond)


def replace_layers(
    network: nn.Module, layers: Sequence[ReplacedLayer], bond: int, start: str, seed: int
) -> nn.Module:
    """Put cores in the place of the layers' weights.

    Args:
        network: dense; changed in place. From ``random`` its other parameters stay as they are too.
        layers: the layers to replace.
        bond: D, of the layers that have none of their own.
        start: ``ttsvd``, ``rescaled`` or ``random``.
        seed: seed of the random cores, and of TT-SVD's randomised route.

    Returns:
        The same network.

    Raises:
        UsageError: the factors do not fit.
    """
    for layer in layers:
        structure = layer_structure(network, layer)
        module = network.get_submodule(layer.name)
        own = layer.bond or bond
        if start == RANDOM:
            cores = random_cores(structure, own, derived_seed(seed, "cores", layer.name))
        else:
            weight = module.get_parameter("weight").detach()
            cores = fitted_cores(weight, structure, own, seed, rescaled=start == RESCALED)
        adopt(module, "weight", cores, structure)
    return network


def core_forms(network: nn.Module, layers: Sequence[ReplacedLayer]) -> dict[str, Form]:
    """The replaced layers' cores as they are, on the CPU, by layer."""
    modules = {layer.name: network.get_submodule(layer.name) for layer in layers}
    return {
        name: form_of([core.detach().cpu() for core in module.cores], module.structure)  # type: ignore[union-attr, arg-type]
        for name, module in modules.items()
    }


def choose_bonds(network: nn.Module, layers: Sequence[ReplacedLayer], discard: float) -> None:
    """Cut every bond of the layers' cores to what their own Schmidt spectra ask for; in place."""
    for name, form in core_forms(network, layers).items():
        assert isinstance(form, MPO)
        cores = cut_by_weight(form, discard).cores
        module = network.get_submodule(name)
        module.cores = nn.ParameterList(core.float().contiguous() for core in cores)


def cut_by_weight(form: MPO, discard: float) -> MPO:
    """The smallest bonds whose discarded weight, at each, is at most a share of the squared norm.

    In the canonical form a bond is cut by leaving out its smallest Schmidt values; all bonds together lose at
    most the sum of what they discard.

    Args:
        form: any gauge and bonds.
        discard: the share, from 0 to 1, for each bond.

    Returns:
        float64, in the balanced gauge.
    """
    whole, spectra = form.balanced()
    kept = [rank_within(values, len(values), discard * float(values.square().sum()))[0] for values in spectra]
    bonds = (1, *kept, 1)
    cores = [core[:a, :, :, :b] for core, a, b in zip(whole.cores, bonds[:-1], bonds[1:], strict=True)]
    return MPO(cores, form.structure).balanced()[0]


def random_cores(structure: Structure, bond: int, seed: int) -> list[Tensor]:
    """Normal cores of a chain with variance 2 / (fan-in + fan-out), where fans are D_{k-1} I_k and J_k D_k.

    Source: Glorot and Bengio 2010, Eq. (12), on each core as the matrix that it is in a contraction from the
    left; what Gao et al. 2020 start from.  Those of a MERA are orthogonal, as Hallam et al. 2017 have them.
    """
    generator = torch.Generator().manual_seed(seed)
    if structure.topology is MERA:
        return [core.float() for core in orthogonal_cores(structure, bond, generator)]
    bonds = nominal_bonds(len(structure.site_sizes), bond)
    cores: list[Tensor] = []
    for k, (j, i) in enumerate(zip(structure.output_factors, structure.input_factors, strict=True)):
        a, b = bonds[k], bonds[k + 1]
        deviation = math.sqrt(2 / (a * i + j * b))
        cores.append(torch.randn(a, j, i, b, generator=generator) * deviation)
    return cores


def fitted_cores(
    weight: Tensor, structure: Structure, bond: int, seed: int, rescaled: bool = False
) -> list[Tensor]:
    """TT-SVD of a dense weight, of a convolution's whole map where the structure says so.

    Truncation is an orthogonal projection: of the squared norm it keeps 1 − ε², at a relative error of ε.
    Layers in a row each shrink what they pass on by that, and gradients with it. Rescaled cores have the
    norm of the dense weight again (nearly, with padding), at a larger error: a start for training, not an
    approximation.
    """
    fit = fit_mpo(weight, structure, Truncation(bond), Target(seed=seed))
    if not rescaled:
        return fit.form.cores
    scale = (1 - fit.relative_error**2) ** (-0.5 / len(fit.form.cores))
    return [core * scale for core in fit.form.cores]
