"""A mixture of experts' stacked weight, held as the single matrices that checkpoints store.

A network reads ``gate_up_proj`` (experts, outputs, inputs) as one tensor; its checkpoint stores
``3.w1.weight`` and ``3.w3.weight`` for every expert, and cores are made of those.  Here each matrix has a
linear layer of its own, dense or with cores, and the stacked weight is put together whenever it is read.  The
trade-off: each reading costs a copy of the stacked weight (one in a forward pass, but for transformers'
``eager`` experts, which read it again for every expert).
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor, nn

from mpoc.nn.weight import CoreWeight


def unstack(module: nn.Module, name: str, sources: tuple[str, ...]) -> None:
    """Replace the stacked weight ``name`` by one ``nn.Linear`` for each expert and source.

    Args:
        module: that holds the weight; changed in place. Gains ``0.w1``, ``0.w3``, ``1.w1``, …
        name: of a weight (experts, outputs, inputs), e.g. (8, 28672, 4096).
        sources: the matrices of an expert, e.g. ``("w1", "w3")``: one below the other they are its weight.

    Raises:
        ValueError: the weight has not three axes, or its outputs do not divide among the sources.
    """
    dense = module.get_parameter(name)
    if dense.dim() != 3 or dense.shape[1] % len(sources):
        raise ValueError(
            f"weight {name!r} has shape {tuple(dense.shape)}: no stack of {' and '.join(sources)}"
        )
    for expert, matrix in enumerate(dense.detach()):
        if str(expert) not in module._modules:
            module.add_module(str(expert), nn.Module())
        for source, rows in zip(sources, matrix.chunk(len(sources)), strict=True):
            linear = nn.Linear(rows.shape[1], rows.shape[0], bias=False, device="meta")
            linear.weight = nn.Parameter(rows.clone(), requires_grad=dense.requires_grad)
            module.get_submodule(str(expert)).add_module(source, linear)
    delattr(module, name)
    module.__class__ = _stacking(type(module), name, sources, len(dense))  # type: ignore[arg-type]


@cache
def _stacking(cls: type[nn.Module], name: str, sources: tuple[str, ...], experts: int) -> type[nn.Module]:
    """A subclass of ``cls`` whose attribute ``name`` is stacked from the experts whenever it is read."""

    def stack(module: nn.Module) -> Tensor:
        columns = [
            torch.stack([_weight(module.get_submodule(f"{expert}.{source}")) for expert in range(experts)])
            for source in sources
        ]
        return torch.cat(columns, dim=1)

    return type(f"MPO{cls.__name__.removeprefix('MPO')}", (cls,), {name: property(stack)})


def _weight(linear: nn.Module) -> Tensor:
    return linear.dense_weight() if isinstance(linear, CoreWeight) else linear.get_parameter("weight")
