"""y = Ŵx through the cores of a MERA, or through a weight that is built for the call, whichever is cheaper.

Each core in turn takes its two lower legs off the batch and puts its upper two there;
:mod:`mpoc.tensor_networks.topology` orders them so that what is held in between stays small.  For large
batches the dense weight costs less.

Fully connected layers through cores: ``nn.Linear``, and transformers' transposed ``Conv1D``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, pad

from mpoc.nn.contract import contract, is_traced, planned_batch
from mpoc.nn.weight import CoreWeight, is_autocast
from mpoc.tensor_networks.forms.contraction import contract_all, leg_sizes, traced_once, work
from mpoc.tensor_networks.forms.mera import bond_of
from mpoc.tensor_networks.forms.stored import as_chain, split
from mpoc.tensor_networks.structure import Structure
from mpoc.tensor_networks.topology import mera

# Numbers held at a time; a larger batch goes through in parts.
_AT_ONCE = 1 << 24
# Multiplications that take as long as moving one number to memory and back.
_MOVING = 40


def contract_mera(x: Tensor, cores: Sequence[Tensor], structure: Structure) -> Tensor:
    """Ŵx for every vector of a batch.

    Args:
        x: (batch, I_1·…·I_n).
        cores: in the order of ``structure.wiring``.
        structure: its network is ``mera``.

    Returns:
        (batch, J_1·…·J_n).
    """
    sides = structure.output_factors, structure.input_factors
    rebuild, largest, legs = _plan(*sides, tuple([tuple(core.shape) for core in cores]), planned_batch(x))
    sites = range(1, len(sides[0]) + 1)
    outputs, inputs = tuple([f"j{k}" for k in sites]), tuple([f"i{k}" for k in sites])
    if is_autocast(x.device):  # all products in its dtype, as those of a chain are
        dtype = torch.get_autocast_dtype(x.device.type)
        x, cores = x.to(dtype), [core.to(dtype) for core in cores]
    if rebuild:
        weight = contract_all(cores, legs, (*outputs, *inputs)).reshape(-1, x.shape[1])
        return x @ weight.T
    at_once = max(1, _AT_ONCE // largest)
    parts = [x] if is_traced() or x.shape[0] <= at_once else x.split(at_once)
    named, result = (("n", *inputs), *legs), ("n", *outputs)
    steps = [(0 if k == 1 else len(cores) + k - 1, k) for k in range(1, len(named))]
    found = []
    for part in parts:
        state = part.reshape(-1, *sides[1])
        found.append(contract_all([state, *cores], named, result, steps).flatten(1))
    return torch.cat(found) if len(found) > 1 else found[0]


@cache
def _estimated(
    outputs: tuple[int, ...], inputs: tuple[int, ...], shapes: tuple[tuple[int, ...], ...], batch: int
) -> tuple[bool, int, tuple[tuple[str, ...], ...]]:
    """Whether to build the weight, the numbers held of one vector on the way through, and the cores' legs."""
    cores = mera(outputs, inputs, bond_of(outputs, inputs, shapes))
    size = largest = math.prod(inputs)
    through = 0
    for core in cores:
        multiplications = size * math.prod(core.shape[:2])
        size = multiplications // math.prod(core.shape[2:])
        through += multiplications + _MOVING * size
        largest = max(largest, size)
    legs = tuple(core.legs for core in cores)
    multiplications, made = work(legs, leg_sizes(legs, shapes))
    dense = math.prod(outputs) * math.prod(inputs)
    return multiplications + _MOVING * made + batch * dense < batch * through, largest, legs


_plan = traced_once(_estimated)


class MPOLinear(CoreWeight, nn.Linear):
    """y = Ŵx + b, Ŵ of shape (N_y, N_x) given by its cores (Eqs. 2 and 5 of Gao et al. 2020).

    Shapes: (…, in_features) → (…, out_features), as ``nn.Linear``.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Through the cores, or through the dense weight where it is cached."""
        if self._dense is not None and not self.training:
            return linear(input, self._dense, self.bias)
        return through_cores(self, input)


class MPOConv1D(CoreWeight):
    """transformers' ``Conv1D``, a linear layer that stores its weight as (inputs, outputs)."""

    def forward(self, x: Tensor) -> Tensor:
        """(…, nx) → (…, nf)."""
        if self._dense is not None and not self.training:
            return linear(x, self._dense.T, self.bias)
        return through_cores(self, x)


def through_cores(layer: CoreWeight, x: Tensor) -> Tensor:
    """Ŵx + b for x of shape (…, N_x); padded inputs are zeros, padded outputs are dropped."""
    structure = layer.structure
    if x.shape[-1] != structure.inputs:
        raise RuntimeError(f"input has {x.shape[-1]} features, the layer takes {structure.inputs}")
    flat = x.reshape(-1, structure.inputs)
    if layer.order is not None:
        flat = flat[:, layer.order]
    cores, added = split(list(layer.cores), structure)
    rows, columns = structure.padding
    if columns:
        flat = pad(flat, (0, columns))
    if added and (rows or columns):
        added = [pad(added[0], (0, 0, 0, 0, 0, rows)), pad(added[1], (0, 0, 0, columns))]
    if structure.network == "mera":
        y = contract_mera(flat, cores, structure)
    else:
        y = contract(flat, as_chain(cores, structure), added)
    if rows:
        y = y[:, : structure.outputs]
    if layer.bias is not None:
        y = y + layer.bias.to(y.dtype)  # under autocast the product is narrower
    return y.reshape(*x.shape[:-1], structure.outputs)
