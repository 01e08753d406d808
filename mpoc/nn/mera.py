"""y = Ŵx through the cores of a MERA, or through a weight that is built for the call, whichever is cheaper.

Each core in turn takes its two lower legs off the batch and puts its upper two there; :mod:`mpoc.wiring`
orders them so that what is held in between stays small.  For large batches the dense weight costs less.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from mpoc.forms.contraction import contract_all, leg_sizes, work
from mpoc.forms.mera import bond_of
from mpoc.forms.planned import planned
from mpoc.nn.contract import is_traced, planned_batch
from mpoc.nn.weight import is_autocast
from mpoc.structure import Structure
from mpoc.wiring import mera

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


_plan = planned(_estimated)
