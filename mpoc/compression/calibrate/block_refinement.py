"""Refine the compressed layers of a block together, so that it gives what the dense block gives.

    min  Σ (f(x̃) − y)ᵀ G (f(x̃) − y) / Σ yᵀ G y

f is the block with cores, x̃ what it is given in the compressed network, y what the dense block gives on the
dense network's inputs, G the second moment of gradients at the block's output; sums are over rows without
padding.  A block thus also corrects errors of those before it.  Adam (Kingma and Ba 2015) takes batches in a
drawn order; each tensor's step is in proportion to its own size, as the cores of a weight may have any scale.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from mpoc.compression.calibrate.block_chain import Example, features
from mpoc.compression.calibrate.chain_tracer import next_input
from mpoc.compression.calibrate.statistics import CalibrationStatistics
from mpoc.compression.plain_fit import Fitted
from mpoc.compression.plan import LayerPlan
from mpoc.io.checkpoint import Checkpoint
from mpoc.io.manifest import core_prefix
from mpoc.models.introspection import same_tensor
from mpoc.nn.adopt import adopt
from mpoc.runtime.device import derived_seed
from mpoc.runtime.formatting import counted, rounded

_RATE = 0.03  # peak, as a share of a tensor's root mean square
_SMALLEST = 0.02  # root mean square that a tensor has at least, as far as its rate goes: biases may be zero
_STEPS, _PASSES = 600, 8  # at least that many steps, and passes over the examples
_SHARE = 0.1  # of the identity in G
_WARM_UP = 0.05  # share of the steps
_EVALUATIONS = 10
_ALONE = 1e-11  # seconds of a fit by the weight alone, for each unit of its cost


@dataclass(frozen=True)
class Refined:
    """The loss on held-out examples before and after, and the refined tensors."""

    before: float
    after: float
    tensors: Mapping[str, Tensor]  # by name in the block, in their stored dtypes; none where none are better


def refine_block(
    block: nn.Module,
    stored: Mapping[str, torch.dtype],
    examples: Sequence[Example],
    held_out: Sequence[Example],
    metric: Tensor | None = None,
    seed: int = 0,
) -> Refined:
    """Train some parameters of a block, and keep the best of several states, as stored.

    Args:
        block: float32, in evaluation mode; it is changed.
        stored: the parameters to train, by name in the block, and the dtype each is rounded to in the end.
        examples: to train on.
        held_out: to choose the state by.
        metric: G (width, width) to a factor; None: the identity.
        seed: of the order.
    """
    block.requires_grad_(False)
    tensors = {name: block.get_parameter(name).requires_grad_(True) for name in stored}
    optimizer = torch.optim.Adam([{"params": [p], "scale": _size(p)} for p in tensors.values()])
    root = None if metric is None else _root(metric)
    before = after = distance(block, held_out, root)
    best: dict[str, Tensor] = {}
    scale = _energy(examples, root)
    steps = max(_STEPS, _PASSES * len(examples))
    for step, index in enumerate(_order(len(examples), steps, seed), start=1):
        for group in optimizer.param_groups:
            group["lr"] = group["scale"] * refinement_rate(step - 1, steps)
        error, _ = _squares(block, examples[index], root)
        if not error.requires_grad:  # the block itself has switched gradients off
            break
        optimizer.zero_grad()
        (error * (len(examples) / scale)).backward()
        optimizer.step()
        if step % math.ceil(steps / _EVALUATIONS) == 0 or step == steps:
            rounded = {name: p.detach().to(stored[name], copy=True) for name, p in tensors.items()}
            reached = _distance_with(block, rounded, held_out, root)
            if reached < after:
                after, best = reached, rounded
    return Refined(before, after, best)


def refinement_rate(step: int, steps: int) -> float:
    """The learning rate of step ``step`` (from 0) at size 1: a linear warm-up, then half a cosine to 0."""
    warm_up = max(1.0, _WARM_UP * steps)
    return _RATE * min(1.0, (step + 1) / warm_up) * 0.5 * (1 + math.cos(math.pi * step / steps))


@torch.no_grad()
def distance(block: nn.Module, examples: Sequence[Example], root: Tensor | None = None) -> float:
    """The loss with G = ``root`` rootᵀ; 0 for 0/0."""
    error = total = 0.0
    for example in examples:
        error_part, target = _squares(block, example, root)
        error, total = error + float(error_part), total + float(target)
    return error / total if total else math.inf if error else 0.0


@torch.no_grad()
def _distance_with(
    block: nn.Module, tensors: Mapping[str, Tensor], examples: Sequence[Example], root: Tensor | None
) -> float:
    before = {name: block.get_parameter(name).clone() for name in tensors}
    for name, tensor in tensors.items():
        block.get_parameter(name).copy_(tensor)
    reached = distance(block, examples, root)
    for name, tensor in before.items():
        block.get_parameter(name).copy_(tensor)
    return reached


def _squares(block: nn.Module, example: Example, root: Tensor | None) -> tuple[Tensor, Tensor]:
    """The numerator and the denominator of the loss on a batch."""
    output = next_input(block(_float(example.given), *_float(example.args), **_float(example.named)))
    assert output is not None, "a block of a chain gives a tensor"
    target = features(example.target.float(), example.mask, example.axis)
    error = features(output, example.mask, example.axis) - target
    if root is not None:
        error, target = error @ root, target @ root
    return error.square().sum(), target.square().sum()


def _energy(examples: Sequence[Example], root: Tensor | None) -> float:
    """Σ yᵀ G y, or 1 where it is 0."""
    targets = (features(e.target.float(), e.mask, e.axis) for e in examples)
    return sum(float((y if root is None else y @ root).square().sum()) for y in targets) or 1.0


def _root(metric: Tensor) -> Tensor:
    """H with H Hᵀ = G, of mean 1 on the diagonal; a share of the identity keeps every direction in."""
    width = len(metric)
    mean = metric.diagonal().mean().clamp(min=torch.finfo(metric.dtype).tiny)
    one = torch.eye(width, dtype=metric.dtype, device=metric.device)
    return torch.linalg.cholesky((1 - _SHARE) * metric / mean + _SHARE * one).float()


def _float(value: Any) -> Any:
    """The value with all floating-point tensors in it as float32."""
    if isinstance(value, Tensor):
        return value.float() if value.is_floating_point() else value
    if isinstance(value, dict):
        return {name: _float(entry) for name, entry in value.items()}
    if type(value) in (tuple, list):
        return type(value)(map(_float, value))
    return value


def _size(tensor: Tensor) -> float:
    return max(_SMALLEST, float(tensor.detach().square().mean().sqrt()))


def _order(count: int, steps: int, seed: int) -> Iterator[int]:
    """``steps`` numbers below ``count``, pass after pass."""
    generator = torch.Generator().manual_seed(seed)
    passes = math.ceil(steps / count)
    drawn = [torch.randperm(count, generator=generator) for _ in range(passes)]
    return iter(torch.cat(drawn)[:steps].tolist())


BlockPosition = tuple[int, int]  # chain, position
ScheduleStep = tuple[BlockPosition | None, list[list[str]]]


class Schedule:
    """The steps of a calibrated fit; layers go by their names.

    Args:
        groups: of layers whose inputs are observed, those of one input together, in the network's order.
        block_of: the block that a group is refined with; None: it is fitted by itself.
        seconds_of: seconds of the fit of a layer whose inputs are observed.
        passes: seconds that passes of both networks over the data take besides.
    """

    def __init__(
        self,
        groups: Sequence[Sequence[str]],
        block_of: Callable[[Sequence[str]], BlockPosition | None],
        seconds_of: Callable[[str], float],
        passes: float,
    ) -> None:
        self._groups, self._block_of = groups, block_of
        self._seconds_of, self._passes = seconds_of, passes
        self.observed = {name for group in groups for name in group}  # layers that are fitted to their inputs

    def of(self, names: Container[str]) -> Iterator[ScheduleStep]:
        """The steps for these layers: a block with its groups of layers, or a group by itself."""
        present = [[name for name in group if name in names] for group in self._groups]
        for position, part in groupby(filter(None, present), self._block_of):
            groups = list(part)
            yield from [(position, groups)] if position is not None else [(None, [group]) for group in groups]

    def units(self, plans: Sequence[LayerPlan]) -> list[list[str]]:
        """Layers that are fitted together, in order; first, singly, those whose inputs are not observed."""
        names = [plan.map.name for plan in plans]
        alone = [[name] for name in names if name not in self.observed]
        return alone + [[name for group in groups for name in group] for _, groups in self.of(names)]

    def costs(self, plans: Sequence[LayerPlan]) -> dict[str, float]:
        """Seconds of the fits; the first layer of a unit has those of the whole unit.

        They include passes through the layers before it that are left unchanged.
        """
        known, costs = {plan.map.name: plan for plan in plans}, dict[str, float]()
        behind = 0.0
        for unit in self.units(plans):
            changed = [known[name] for name in unit if not known[name].is_unchanged]
            behind += self._passes * len(self.observed.intersection(unit)) / max(1, len(self.observed))
            costs |= dict.fromkeys(unit, 0.0)
            if changed:
                costs[unit[0]], behind = sum(map(self._cost, changed)) + behind, 0.0
        return costs

    def _cost(self, plan: LayerPlan) -> float:
        """Seconds of one fit."""
        name = plan.map.name
        return self._seconds_of(name) if name in self.observed else plan.cost * _ALONE


class BlockRefinement:
    """Refines the blocks of a network that is compressed layer by layer.

    Args:
        statistics: of the dense network on calibration data.
        compressed: the network that gets the compressed weights as they are found.
        checkpoint: to read tensors from.
        seed: of the order of the examples.
    """

    def __init__(
        self, statistics: CalibrationStatistics, compressed: nn.Module, checkpoint: Checkpoint, seed: int
    ) -> None:
        self._statistics, self._compressed, self._checkpoint, self._seed = (
            statistics,
            compressed,
            checkpoint,
            seed,
        )
        self._tied = same_tensor(statistics.network)
        self._named = {inner: name for name, inner in statistics.places.items()}
        self._losses: dict[str, tuple[float, float]] = {}  # of refined blocks
        self._left: list[str] = []  # compressed layers that were not refined

    def position_of(self, name: str) -> BlockPosition | None:
        """The block that a weight is refined with; None if there is none."""
        weight = self._statistics.places.get(name, "")
        position = self._statistics.position_of(weight)
        if (
            position is None
            or len(self._tied[weight]) > 1
            or weight == f"{self._statistics.block(position)}.weight"
        ):
            return None
        return position

    def refine(self, position: BlockPosition | None, fitted: Sequence[Fitted]) -> list[Fitted]:
        """Refine the layers of a block; the first of them carries the norms that changed.

        Args:
            position: of the block; None for layers that have none.
            fitted: all its selected layers; the compressed network has them already.

        Returns:
            The layers, their records as they were, one of them with the losses of the block; cores of those
            that are dense, and of all where no state was better on held-out examples, as they were.
        """
        compressed = [one for one in fitted if one.cores]
        if position is None or not compressed:
            self._left += [one.record.layer for one in compressed]
            return list(fitted)
        path = self._statistics.block(position)
        self._statistics.context.log("refining block", len(self._losses) + 1, self._count)
        block, cores = self._with_cores(path, compressed)
        vectors = self._vectors(path, block, compressed)
        stored = {name: getattr(torch, one.record.stored_dtype) for name, one in cores.items()}
        stored |= {name: self._checkpoint.read(own).dtype for name, own in vectors.items()}
        examples, held_out = self._statistics.examples(self._compressed, position)
        seed = derived_seed(self._seed, "refine", path)
        refined = refine_block(block, stored, examples, held_out, self._statistics.metric(position), seed)
        self._losses[path] = refined.before, refined.after
        if not refined.tensors:
            return self._with_losses(path, fitted)
        changed = {own: refined.tensors[name].cpu() for name, own in vectors.items()}
        new = {one.record.name: self._taken(one, path, refined.tensors, changed) for one in compressed}
        first = compressed[0].record.name
        new[first] = replace(new[first], changed={**new[first].changed, **changed})
        return self._with_losses(path, [new.get(one.record.name, one) for one in fitted])

    def _with_losses(self, path: str, fitted: Sequence[Fitted]) -> list[Fitted]:
        first = next(one.record.name for one in fitted if one.cores)
        losses = {path: self._losses[path]}
        return [replace(one, losses=losses) if one.record.name == first else one for one in fitted]

    def restore(self, position: BlockPosition | None, fitted: Sequence[Fitted]) -> None:
        """Record the layers of a block that an earlier run refined."""
        self._left += [one.record.layer for one in fitted if one.cores and position is None]
        for one in fitted:
            self._losses |= one.losses

    @cached_property
    def _count(self) -> int:
        """The number of blocks that may have a layer to refine."""
        positions = {self.position_of(name) for group in self._statistics.groups for name in group}
        return len(positions - {None})

    def revert(self, position: BlockPosition | None, fitted: Sequence[Fitted]) -> list[Fitted]:
        """The layers without the last refinement, after which the network was no nearer to the dense one."""
        path = self._statistics.block(position) if position is not None else ""
        before, _ = self._losses[path]
        self._losses[path] = before, before
        return self._with_losses(path, fitted)

    def facts(self) -> dict[str, Any]:
        """For the manifest: by block the loss on held-out examples, before and after."""
        return {
            path: {"before": rounded(before), "after": rounded(after)}
            for path, (before, after) in self._losses.items()
        }

    @property
    def notes(self) -> list[str]:
        """A summary of all refined blocks, and the layers that have no block."""
        notes = []
        if self._losses:
            before, after = (sum(losses) / len(losses) for losses in zip(*self._losses.values(), strict=True))
            better = sum(after < before for before, after in self._losses.values())
            notes.append(
                f"refined {better} of {len(self._losses)} blocks: relative error of their outputs on "
                f"held-out examples {math.sqrt(before):.4f} → {math.sqrt(after):.4f}"
            )
        if self._left:
            names = ", ".join(self._left[:4]) + (", …" if len(self._left) > 4 else "")
            notes.append(
                f"not refined: {counted(len(self._left), 'layer')} ({names}), each alone in its block, "
                "in several blocks or in none"
            )
        return notes

    def _with_cores(self, path: str, fitted: Sequence[Fitted]) -> tuple[nn.Module, dict[str, Fitted]]:
        """A float32 copy of a block that computes through cores, and the layer of each core by name."""
        block = copy.deepcopy(self._compressed.get_submodule(path)).float()
        cores: dict[str, Fitted] = {}
        for one in fitted:
            weight = self._within(path, one)
            own = [core.to(self._statistics.context.device, torch.float32, copy=True) for core in one.cores]
            adopt(block.get_submodule(weight.rpartition(".")[0]), "weight", own, one.record.structure)
            cores |= {f"{core_prefix(weight)}.{k}": one for k in range(len(own))}
        return block, cores

    def _within(self, path: str, fitted: Fitted) -> str:
        """The name of a weight within its block."""
        return self._statistics.places[fitted.record.name].removeprefix(f"{path}.")

    def _vectors(self, path: str, block: nn.Module, fitted: Sequence[Fitted]) -> dict[str, str]:
        """The biases of these layers and the parameters of norms: name in the block → in the checkpoint."""
        modules = {self._within(path, one).rpartition(".")[0] for one in fitted}
        vectors = {}
        for own_path, module in block.named_modules():
            if own_path in modules or "norm" in type(module).__name__.lower():
                for own, parameter in module.named_parameters(own_path, recurse=False):
                    name = f"{path}.{own}"
                    if parameter.dim() == 1 and len(self._tied.get(name, ())) == 1 and name in self._named:
                        vectors[own] = self._named[name]
        return vectors

    def _taken(
        self, fitted: Fitted, path: str, tensors: Mapping[str, Tensor], changed: Mapping[str, Tensor]
    ) -> Fitted:
        """The layer with refined cores, and refined values of the tensors that its fit had changed."""
        prefix = core_prefix(self._within(path, fitted))
        cores = [tensors[f"{prefix}.{k}"].cpu().contiguous() for k in range(len(fitted.cores))]
        own = {name: changed.get(name, tensor) for name, tensor in fitted.changed.items()}
        return replace(fitted, cores=cores, changed=own)
