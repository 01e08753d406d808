"""The MERA (multi-scale entanglement renormalisation ansatz) as an operator: Hallam et al. 2017.

Inputs enter at the bottom and pass disentanglers and isometries level by level; an output leaves at every
isometry. Cores, legs and order are those of :func:`mpoc.tensor_networks.topology.mera`. All cores are free
parameters: training does not keep isometries isometric.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Self

import torch
from torch import Tensor

from mpoc.tensor_networks.forms.contraction import (
    contract_all,
    is_autocast,
    is_traced,
    leg_sizes,
    legs_of_product,
    planned_batch,
    traced_once,
    work,
)
from mpoc.tensor_networks.forms.cost import CPU, GPU, Rates, bandwidth, product_seconds
from mpoc.tensor_networks.forms.form import Form
from mpoc.tensor_networks.structure import Structure
from mpoc.tensor_networks.topology import mera

_Sizes = tuple[int, ...]
# Largest intermediate in numbers; a larger batch goes through in parts.
_AT_ONCE = 1 << 24
# Moving the axes of a number takes as long as reading so many bytes (fitted to 16 layers and batches).
_MOVING = 36


class Mera(Form):
    """A weight as a binary MERA.

    Args:
        cores: (upper two legs, lower two legs) each, in the order in which they are applied.
        structure: a structure of the form ``mera``.

    Raises:
        ValueError: the cores do not have the structure's factors, or bonds differ.
    """

    @property
    def bonds(self) -> tuple[int, ...]:
        """(D,), the dimension of every bond."""
        sides = self.structure.output_factors, self.structure.input_factors
        return (bond_of(*sides, tuple(tuple(core.shape) for core in self.cores)),)

    def balanced(self) -> tuple[Self, list[Tensor]]:
        """The same weight in float64 with cores of equal norms; a MERA has no Schmidt values."""
        cores = [core.double() for core in self.cores]
        norms = [float(core.norm()) for core in cores]
        if all(norms):
            mean = math.exp(math.fsum(map(math.log, norms)) / len(norms))
            cores = [core * (mean / norm) for core, norm in zip(cores, norms, strict=True)]
        return self.with_cores(cores), []

    def halves(self) -> tuple[Tensor, Tensor]:
        """The interleaved tensor as one column, and (1, 1)."""
        sites = range(1, len(self.structure.site_sizes) + 1)
        tensor = self.contracted([leg for k in sites for leg in (f"j{k}", f"i{k}")])
        return tensor.reshape(-1, 1), tensor.new_ones(1, 1)

    def apply_padded(self, x: Tensor) -> Tensor:
        """(n, ΠI) → (n, ΠJ)."""
        return contract_mera(x, self.cores, self.structure)

    def dense_is_faster(self, batch: int) -> bool:
        """By the cost model, for ``batch`` vectors."""
        structure, on_gpu = self.structure, self.cores[0].is_cuda
        rates = GPU if on_gpu else CPU
        dense = product_seconds(1, batch, structure.inputs, structure.outputs, rates)
        return dense < _plan(*_shapes(structure, self.cores), batch, on_gpu).seconds + rates.call

    def contracted(self, legs: Sequence[str]) -> Tensor:
        """Contract all cores to one tensor with these legs (j1, i1, …) in this order."""
        return contract_all(self.cores, self.legs, tuple(legs))


@cache
def bond_of(outputs: tuple[int, ...], inputs: tuple[int, ...], shapes: tuple[tuple[int, ...], ...]) -> int:
    """The bond dimension at which cores have these shapes; 1 if there is none."""
    sizes = sorted({1, *(size for shape in shapes for size in shape)})
    fits = (size for size in sizes if tuple(core.shape for core in mera(outputs, inputs, size)) == shapes)
    return next(fits, 1)


def contract_mera(x: Tensor, cores: Sequence[Tensor], structure: Structure) -> Tensor:
    """Ŵx for every vector of a batch.

    Args:
        x: (batch, I_1·…·I_n).
        cores: the cores in the order of ``structure.cores``.
        structure: a structure of the form ``mera``.

    Returns:
        (batch, J_1·…·J_n).
    """
    sides = structure.output_factors, structure.input_factors
    plan = _plan(*_shapes(structure, cores), planned_batch(x), x.is_cuda)
    sites = range(1, len(sides[0]) + 1)
    outputs, inputs = tuple([f"j{k}" for k in sites]), tuple([f"i{k}" for k in sites])
    if is_autocast(x.device):  # all products in its dtype, as for a chain
        dtype = torch.get_autocast_dtype(x.device.type)
        x, cores = x.to(dtype), [core.to(dtype) for core in cores]
    if plan.rebuild:
        # Legs in the order of the product: moving those of the weight would take longer than all else.
        made, taken = (sorted(names, key=plan.order.index) for names in (outputs, inputs))
        weight = contract_all(cores, plan.legs, (*made, *taken)).reshape(-1, x.shape[1])
        y = _reordered(x, sides[1], [inputs.index(name) for name in taken]) @ weight.T
        sizes = [sides[0][outputs.index(name)] for name in made]
        return _reordered(y, sizes, [made.index(name) for name in outputs])
    at_once = max(1, _AT_ONCE // plan.largest)
    parts = [x] if is_traced() or x.shape[0] <= at_once else x.split(at_once)
    named, result = (("n", *inputs), *plan.legs), ("n", *outputs)
    steps = [(0 if k == 1 else len(cores) + k - 1, k) for k in range(1, len(named))]
    applied = []
    for part in parts:
        state = part.reshape(-1, *sides[1])
        applied.append(contract_all([state, *cores], named, result, steps).flatten(1))
    return torch.cat(applied) if len(applied) > 1 else applied[0]


def _reordered(x: Tensor, sizes: Sequence[int], order: Sequence[int]) -> Tensor:
    """(n, Π sizes) with the axes of each row in another order."""
    return x.reshape(-1, *sizes).permute(0, *(k + 1 for k in order)).flatten(1)


def _shapes(structure: Structure, cores: Sequence[Tensor]) -> tuple[_Sizes, _Sizes, tuple[_Sizes, ...]]:
    """What a plan depends on: output and input factors, and the shapes of the cores."""
    return structure.output_factors, structure.input_factors, tuple([tuple(core.shape) for core in cores])


@dataclass(frozen=True)
class _Plan:
    """How to contract a batch."""

    rebuild: bool  # build the weight first
    seconds: float  # estimated
    largest: int  # numbers of the largest intermediate of a vector
    legs: tuple[tuple[str, ...], ...]  # of the cores
    order: tuple[str, ...]  # of the legs of a weight that is built


@cache
def _estimated(
    outputs: _Sizes, inputs: _Sizes, shapes: tuple[_Sizes, ...], batch: int, on_gpu: bool
) -> _Plan:
    """Whether to build the weight, or to take the vectors through the cores, by the cost model."""
    rates = GPU if on_gpu else CPU
    cores = mera(outputs, inputs, bond_of(outputs, inputs, shapes))
    size = largest = math.prod(inputs)
    through = 0.0
    for core in cores:
        upper, lower = math.prod(core.shape[:2]), math.prod(core.shape[2:])
        through += _step(batch * size // lower, lower, upper, rates)
        size = size // lower * upper
        largest = max(largest, size)
    legs = tuple(core.legs for core in cores)
    multiplications, made = work(legs, leg_sizes(legs, shapes))
    building = (
        2 * multiplications / rates.flops + 8 * made / bandwidth(made, rates) + 2 * len(cores) * rates.start
    )
    building += product_seconds(1, batch, math.prod(inputs), math.prod(outputs), rates)
    order = legs_of_product(legs, leg_sizes(legs, shapes))
    return _Plan(building < through, min(building, through), largest, legs, order)


def _step(vectors: int, lower: int, upper: int, rates: Rates) -> float:
    """Seconds to apply a core to ``vectors`` of its lower legs, after their axes have moved."""
    moving = _MOVING * vectors * lower / rates.bytes
    return rates.start + moving + product_seconds(1, vectors, lower, upper, rates)


_plan = traced_once(_estimated)
