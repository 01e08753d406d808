"""Fit a MERA to a weight: variational (Evenbly & Vidal 2009), all cores at once.

    start     either a hierarchical SVD, whose disentanglers are identities, or random orthogonal cores;
              the one from which the first steps of the descent reach the lower error
    descent   L-BFGS over all cores (:mod:`mpoc.tensor_networks.fit.lbfgs`), in the weight's working dtype

The bonds of a MERA close loops, so there is no canonical form and no optimal truncation. Random orthogonal
cores are also what Hallam et al. 2017 start their layers from (Saxe et al. 2013).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from mpoc.tensor_networks.fit.lbfgs import LBFGS
from mpoc.tensor_networks.fit.metric import Metric
from mpoc.tensor_networks.fit.truncation import (
    DEFAULT_TARGET,
    Target,
    Truncation,
    exponent_of,
    scaled,
    squared_norm,
    truncate,
)
from mpoc.tensor_networks.fit.tt_svd import Fit, stored_fit
from mpoc.tensor_networks.forms.contraction import leg_sizes, work
from mpoc.tensor_networks.forms.layout import deinterleave_matrix, interleave, unpadded
from mpoc.tensor_networks.forms.mera import Mera
from mpoc.tensor_networks.structure import Structure, make_structure
from mpoc.tensor_networks.topology import Core

# Steps between two checks of whether the error still falls.
_STRETCH = 20
# The descent ends when a stretch lowers the squared error by less than this share.
_GAIN = 0.005
MOST_STEPS = 400
# Limit on multiplications, and on numbers moved at this price, in all steps: some seconds on one core.
_WORK = 2e10
_MOVING = 8


def orthogonal_cores(structure: Structure, bond: int, generator: torch.Generator) -> list[Tensor]:
    """Each core as a matrix (upper legs, lower legs) drawn by the Haar measure, float64.

    A core whose upper legs have the larger product is an isometry, else the transpose of one. Cores are
    scaled to keep the variance of what goes through them.

    Args:
        structure: a structure of the form ``mera``.
        bond: D.
        generator: CPU generator.
    """
    cores = []
    for shape in structure.core_shapes(structure.bonds(bond)):
        half = len(shape) // 2
        upper, lower = math.prod(shape[:half]), math.prod(shape[half:])
        matrix = haar(max(upper, lower), min(upper, lower), generator) * math.sqrt(max(1.0, upper / lower))
        cores.append((matrix if upper >= lower else matrix.T).reshape(shape))
    return cores


def haar(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """(rows, columns) with orthonormal columns, uniformly distributed; float64.

    Source: Mezzadri, Notices of the AMS 54, 592 (2007): QR of a normal matrix, R's diagonal made positive.
    """
    orthonormal, upper = torch.linalg.qr(torch.randn(rows, columns, generator=generator, dtype=torch.float64))
    return orthonormal * upper.diagonal().sign()


def fit_mera(
    weight: Tensor,
    structure: Structure,
    truncation: Truncation,
    target: Target = DEFAULT_TARGET,
) -> Fit:
    """Fit a MERA whose bonds all have the dimension ``truncation.max_bond``.

    Arguments and result are those of :func:`mpoc.tensor_networks.fit.tt_svd.tt_svd`, but the cores have equal
    norms, and the seed is also that of the random start.

    Raises:
        ValueError: the truncation has a tolerance or a share to discard; a MERA's error is known only after
            the fit.
    """
    if truncation.is_open:
        raise ValueError("the bonds of a MERA cannot be truncated to a tolerance")
    tensor = interleave(weight, structure)
    exponent = exponent_of(tensor)
    tensor = scaled(tensor, -exponent)
    norm = math.sqrt(squared_norm(tensor))
    form = tree_mera(tensor, structure, truncation.max_bond, target.seed)
    if norm > 0.0:
        form = _descend(tensor, norm, form, target.seed)
    return stored_fit(tensor, norm**2, form, target.dtype or weight.dtype, exponent=exponent)


def _descend(tensor: Tensor, norm: float, start: Mera, seed: int) -> Mera:
    """Descend from the better of two starts; the result is no worse than either."""
    structure, (bond,) = start.structure, start.bonds
    working = _as_linear(structure)
    metric = _plain_metric(tensor / norm, structure, working)
    cores = orthogonal_cores(structure, bond, torch.Generator().manual_seed(seed))
    drawn = Mera([core.to(tensor) for core in cores], structure)
    descents = [
        LBFGS(metric, Mera(_scaled(cores, scale), working).balanced()[0])
        for cores, scale in ((start.cores, 1 / norm), (drawn.cores, _half_norm(drawn)))
    ]
    steps = _affordable(start)
    first = max(_STRETCH // 2, min(2 * _STRETCH, steps // 4))
    for descent in descents:
        descent.run(first)
    best = min(descents, key=lambda descent: descent.point.value)
    steps -= 2 * first
    before = math.inf
    while steps >= _STRETCH and best.point.value < (1 - _GAIN) * before:
        before = best.point.value
        best.run(_STRETCH)
        steps -= _STRETCH
    return Mera(_scaled(best.form.cores, norm), structure)


def _affordable(form: Mera) -> int:
    """Number of steps within ``_WORK``, by the shapes alone, so that the fit depends on the weight alone."""
    sizes = leg_sizes(form.legs, [core.shape for core in form.cores])
    multiplications, made = work(tuple(form.legs), sizes)
    return int(min(MOST_STEPS, _WORK / max(1, multiplications + _MOVING * made)))


def tree_mera(tensor: Tensor, structure: Structure, bond: int, seed: int) -> Mera:
    """The hierarchical SVD as a MERA of bond dimension ``bond``, with the arguments of :func:`tree_cores`."""
    return Mera(tree_cores(tensor, structure, bond, torch.Generator().manual_seed(seed)), structure)


def short_descent(tensor: Tensor, structure: Structure, bond: int, seed: int, steps: int) -> Mera:
    """A MERA some steps below its hierarchical SVD in the plain norm: where to start in another norm.

    Args:
        tensor, structure, bond, seed: as :func:`tree_mera` takes them.
        steps: of the descent.
    """
    start, norm = tree_mera(tensor, structure, bond, seed), math.sqrt(squared_norm(tensor))
    if norm == 0:
        return start
    working = _as_linear(structure)
    metric = _plain_metric(tensor / norm, structure, working)
    descent = LBFGS(metric, Mera(_scaled(start.cores, 1 / norm), working).balanced()[0])
    descent.run(steps)
    return Mera(_scaled(descent.form.cores, norm), structure)


def tree_cores(tensor: Tensor, structure: Structure, bond: int, generator: torch.Generator) -> list[Tensor]:
    """The hierarchical SVD as a MERA, in the tensor's dtype.

    If a bond is wider than needed, one of its two cores is zero beyond that and the other random: the weight
    is the same, and the descent can use the rest.

    Args:
        tensor: the interleaved weight (J_1 I_1, J_2 I_2, …).
        structure: a structure of the form ``mera``.
        bond: D.
        generator: generator of the random entries.
    """
    factors = zip(structure.output_factors, structure.input_factors, strict=True)
    legs = [f"{side}{k}" for k in range(1, len(structure.site_sizes) + 1) for side in "ji"]
    rest = _Rest(tensor.reshape([size for pair in factors for size in pair]), legs, generator)
    *first, last = structure.cores((bond,))
    return [*map(rest.cut, first), rest.last(last)]


class _Rest:
    """The remainder of a tensor after the first cores have been cut off.

    Args:
        tensor: the whole tensor.
        legs: the names of its axes.
        generator: generator of the random entries.
    """

    def __init__(self, tensor: Tensor, legs: list[str], generator: torch.Generator) -> None:
        self.tensor, self.legs, self.generator = tensor, legs, generator

    def cut(self, core: Core) -> Tensor:
        """Cut off a core other than the last; its upper bonds replace its lower legs in the remainder."""
        if core.legs[0].startswith("j"):
            return self._isometry(core)
        left, right = (
            self._narrowed(old, new, core.shape[0])
            for old, new in zip(core.legs[2:], core.legs[:2], strict=True)
        )
        made = self._drawn(core)
        made[: left.shape[1], : right.shape[1]] = 0
        made[: left.shape[1], : right.shape[1], : left.shape[0], : right.shape[0]] = torch.einsum(
            "ax,by->xyab", left, right
        )
        return made

    def last(self, core: Core) -> Tensor:
        """The last core: the whole remainder, padded with zeros."""
        made = self.tensor.new_zeros(core.shape)
        rest = self._in_front(core.legs)
        made[tuple(map(slice, rest.shape))] = rest
        return made

    def _isometry(self, core: Core) -> Tensor:
        """(J, D, a, b): the D directions of (j, a, b) that hold most of the remainder."""
        output, upper, *lower = core.legs
        front = self._in_front((output, *lower))
        cut = truncate(front.flatten(0, 2).flatten(1), core.shape[1], generator=self.generator)
        rank = cut.left.shape[1]
        j, a, b = front.shape[:3]
        made = self._drawn(core)
        made[:, :rank] = 0
        made[:, :, a:] = 0
        made[:, :, :, b:] = 0
        made[:, :rank, :a, :b] = cut.left.reshape(j, a, b, rank).movedim(-1, 1)
        self.tensor = cut.right.reshape(rank, *front.shape[3:])
        self.legs = [upper, *self.legs[3:]]
        return made

    def _narrowed(self, old: str, new: str, bond: int) -> Tensor:
        """(size, at most D): the directions of a leg that hold most of the remainder; it loses the others."""
        front = self._in_front((old,))
        cut = truncate(front.flatten(1), bond, generator=self.generator)
        if front.shape[0] <= bond:
            cut = replace(cut, left=torch.eye(front.shape[0]).to(front), right=front.flatten(1))
        self.tensor = cut.right.reshape(-1, *front.shape[1:])
        self.legs[0] = new
        return cut.left

    def _in_front(self, legs: Sequence[str]) -> Tensor:
        """Move these axes of the remainder to the front."""
        order = [*legs, *(leg for leg in self.legs if leg not in legs)]
        self.tensor = self.tensor.permute([self.legs.index(leg) for leg in order])
        self.legs = order
        return self.tensor

    def _drawn(self, core: Core) -> Tensor:
        """A Gaussian core whose rows have norm 1 on average."""
        drawn = torch.randn(core.shape, generator=self.generator, dtype=torch.float64)
        return (drawn / math.sqrt(math.prod(core.shape[2:]))).to(self.tensor)


def _as_linear(structure: Structure) -> Structure:
    """The structure of one linear map without padding that has the same sites."""
    shape = math.prod(structure.output_factors), math.prod(structure.input_factors)
    factors = structure.output_factors, structure.input_factors
    return make_structure("linear", shape, factors=factors, form=structure.form)


def _plain_metric(tensor: Tensor, structure: Structure, working: Structure) -> Metric:
    """The metric of the plain norm, in which padding does not count."""
    inside = unpadded(structure, tensor.device)
    inside = deinterleave_matrix(inside, working)[0]
    outputs, inputs = (inside.any(side).to(tensor.dtype) for side in (1, 0))
    return Metric(deinterleave_matrix(tensor, working)[0], inputs, outputs)


def _scaled(cores: Sequence[Tensor], factor: float) -> list[Tensor]:
    return [*cores[:-1], cores[-1] * factor]


def _half_norm(form: Mera) -> float:
    """The factor to half of the target's norm of 1; from a far smaller norm the descent hardly moves."""
    return 0.5 / math.sqrt(squared_norm(form.to_matrix()))
