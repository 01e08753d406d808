"""Compressed checkpoints whose layers are sums of an MPO and a low-rank part, both random."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mpoc.compression.plain_fit import Fitted
from mpoc.compression.plan import LayerPlan
from mpoc.compression.recipe import make_recipe
from mpoc.compression.resume import layers_folder, resume_directory
from mpoc.compression.run_context import RunContext
from mpoc.compression.source import open_source
from mpoc.compression.write import Compression, Job, write_compressed
from mpoc.tensor_networks.forms.form import form_of
from mpoc.tensor_networks.structure import Structure
from tests.support.weights import by_eq_5

RANK = 2


def low_rank_weight(cores: Sequence[Tensor], structure: Structure) -> Tensor:
    """The weight of two factors, as stored: L R with its axes spelt out."""
    left, right = cores
    product = torch.einsum("ajib,bpqc->jq", left.double(), right.double())
    shape = structure.shape
    if structure.kind.startswith("conv"):  # inputs of the one matrix: taps first, then channels
        product = product.reshape(shape[0], *shape[2:], shape[1]).movedim(-1, 1)
    elif structure.transposed:
        product = product.reshape(*shape[:-2], shape[-1], shape[-2]).transpose(-1, -2)
    return product.reshape(shape)


def sum_weight(cores: Sequence[Tensor], structure: Structure) -> Tensor:
    """The weight by its definition: Eq. (5) entry by entry, plus L R."""
    return by_eq_5(cores[:-2], structure) + low_rank_weight(cores[-2:], structure)


def sum_of(structure: Structure) -> Structure:
    """The structure of a sum whose MPO has this one."""
    return structure.as_form("svd+mpo")


def random_sum(structure: Structure, bond: int = 3, rank: int = RANK, seed: int = 0) -> list[Tensor]:
    """Gaussian float64 cores of both parts."""
    generator = torch.Generator().manual_seed(seed)
    structure = sum_of(structure)
    shapes = structure.core_shapes(structure.bonds(bond, rank))
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


@dataclass(frozen=True)
class _SumJob(Job):
    """A compression whose layers are random sums."""

    def fits(self, kept: Mapping[str, Callable[[], Fitted]] | None = None) -> Iterator[Fitted]:
        return map(_fitted, self.plans)


def compress_to_sums(source: Path, output: Path, **options: Any) -> Compression:
    """Write what ``mpoc compress`` would, with random sums instead of fits."""
    recipe = make_recipe(None, {"bond": 3, "allow_growth": True} | options)
    context, opened = RunContext(torch.device("cpu")), open_source(source, recipe, None, calibrated=False)
    plans = [_added(plan) for plan in opened.plan(recipe)]
    with resume_directory(output, context.group, None, True) as target:
        return write_compressed(_SumJob(opened, recipe, plans, context), target, layers_folder(target))


def _added(plan: LayerPlan) -> LayerPlan:
    if plan.is_dense:
        return plan
    return replace(plan, structure=sum_of(plan.structure), goal=replace(plan.truncation, rank=RANK))


def _fitted(plan: LayerPlan) -> Fitted:
    record = plan.record()
    dtype, cores = getattr(torch, record.stored_dtype), []
    every = random_sum(plan.structure, plan.truncation.max_bond, seed=_seed(plan))
    for form in form_of(every, plan.structure).terms:
        size = float(form.to_weight().std(correction=0)) * math.sqrt(plan.structure.inputs)
        cores += [(core / size ** (1 / len(form.cores))).to(dtype) for core in form.cores]
    return Fitted(replace(record, relative_error=0.5), cores)


def _seed(plan: LayerPlan) -> int:
    return zlib.crc32(plan.map.name.encode())
