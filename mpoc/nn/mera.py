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

from mpoc.forms.contraction import join, work
from mpoc.forms.mera import Mera
from mpoc.nn.contract import planned, planned_batch
from mpoc.structure import Structure

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
    form = Mera(cores, structure)
    rebuild, largest = _plan(structure, form.bonds, planned_batch(x))
    outputs, inputs = ([f"{side}{k + 1}" for k in range(len(structure.site_sizes))] for side in "ji")
    if rebuild:
        weight = form.contracted([*outputs, *inputs]).reshape(-1, x.shape[1])
        return x @ weight.T
    parts = x.split(max(1, _AT_ONCE // largest)) if x.shape[0] > 1 else [x]
    found = [_through(part, form, outputs, inputs) for part in parts]
    return torch.cat(found) if len(found) > 1 else found[0]


def _through(x: Tensor, form: Mera, outputs: list[str], inputs: list[str]) -> Tensor:
    state, legs = x.reshape(-1, *form.structure.input_factors), ("n", *inputs)
    for core, names in zip(form.cores, form.legs, strict=True):
        state, legs = join(state, legs, core, names)
    return state.permute([legs.index(name) for name in ("n", *outputs)]).flatten(1)


@cache
def _estimated(structure: Structure, bonds: tuple[int, ...], batch: int) -> tuple[bool, int]:
    """Whether to build the weight, and the numbers held of one vector on the way through the cores."""
    cores = structure.wiring(bonds)
    size = largest = math.prod(structure.input_factors)
    through = 0
    for core in cores:
        multiplications = size * math.prod(core.shape[:2])
        size = multiplications // math.prod(core.shape[2:])
        through += multiplications + _MOVING * size
        largest = max(largest, size)
    sizes = {leg: n for core in cores for leg, n in zip(core.legs, core.shape, strict=True)}
    multiplications, made = work(tuple(core.legs for core in cores), tuple(sizes.items()))
    dense = math.prod(structure.site_sizes)
    return multiplications + _MOVING * made + batch * dense < batch * through, largest


_plan = planned(_estimated)
