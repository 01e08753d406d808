"""A block's compressed layers trained together: to give what the dense block gave.

    min  Σ (f(x̃) − y)ᵀ G (f(x̃) − y) / Σ yᵀ G y

f is the block with cores, x̃ what it is given in the compressed network, y what the dense block gives on the
dense network's inputs, G what matters to the network's own output; sums are over rows without padding.  So a
block also takes off errors of those before it.  Adam (Kingma and Ba 2015) on batches in a drawn order; each
tensor's step is in proportion to its own size, as the cores of a weight may have any scale.

Which layers of a network are refined block by block, with what else in the block, and what came of it.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from mpoc.compression.calibrate.statistics import CalibrationStatistics
from mpoc.compression.calibrate.trace import Example, features, next_input
from mpoc.compression.plain_fit import Fitted
from mpoc.io.checkpoint import Checkpoint
from mpoc.io.manifest import core_prefix
from mpoc.models.introspection import same_tensor
from mpoc.nn.adopt import adopt
from mpoc.runtime.device import derived_seed
from mpoc.runtime.formatting import rounded

_RATE = 0.03  # peak, as a share of a tensor's root mean square
_SMALLEST = 0.02  # root mean square that a tensor has at least, as far as its rate goes: biases may be zero
_STEPS, _PASSES = 600, 8  # at least that many steps, and passes over the examples
_SHARE = 0.1  # of the identity in G
_WARM_UP = 0.05  # share of the steps
_EVALUATIONS = 10


@dataclass(frozen=True)
class Refined:
    """The loss above on held-out examples, and the tensors that make it."""

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
    """Train some parameters of a block; of several states on the way the best one, as stored, is taken.

    Args:
        block: float32, in evaluation mode; it is changed.
        stored: the parameters to train, by name in the block, and the dtype each is rounded to in the end.
        examples: to train on.
        held_out: to choose the state by.
        metric: G (width, width) to a factor: E[g gᵀ], g the gradient of the network's output by a row; None:
            the identity.
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
            found = _distance_with(block, rounded, held_out, root)
            if found < after:
                after, best = found, rounded
    return Refined(before, after, best)


def refinement_rate(step: int, steps: int) -> float:
    """Of step ``step`` (from 0) for a tensor of size 1: a linear warm-up, then half a cosine to 0."""
    warm_up = max(1.0, _WARM_UP * steps)
    return _RATE * min(1.0, (step + 1) / warm_up) * 0.5 * (1 + math.cos(math.pi * step / steps))


@torch.no_grad()
def distance(block: nn.Module, examples: Sequence[Example], root: Tensor | None = None) -> float:
    """The loss above with G = ``root`` rootᵀ; 0 for 0/0."""
    error = total = 0.0
    for example in examples:
        found, target = _squares(block, example, root)
        error, total = error + float(found), total + float(target)
    return error / total if total else math.inf if error else 0.0


@torch.no_grad()
def _distance_with(
    block: nn.Module, tensors: Mapping[str, Tensor], examples: Sequence[Example], root: Tensor | None
) -> float:
    before = {name: block.get_parameter(name).clone() for name in tensors}
    for name, tensor in tensors.items():
        block.get_parameter(name).copy_(tensor)
    found = distance(block, examples, root)
    for name, tensor in before.items():
        block.get_parameter(name).copy_(tensor)
    return found


def _squares(block: nn.Module, example: Example, root: Tensor | None) -> tuple[Tensor, Tensor]:
    """Both sums of a batch."""
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
    """Floating-point tensors as float32, wherever they are."""
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


class BlockRefinement:
    """The blocks of a network that is compressed layer by layer.

    Args:
        study: of the dense network and the calibration data.
        compressed: the network that gets the compressed weights as they are found.
        checkpoint: that is compressed.
        seed: of the order of the examples.
    """

    def __init__(
        self, study: CalibrationStatistics, compressed: nn.Module, checkpoint: Checkpoint, seed: int
    ) -> None:
        self._study, self._compressed, self._checkpoint, self._seed = study, compressed, checkpoint, seed
        self._tied = same_tensor(study.network)
        self._named = {place: name for name, place in study.places.items()}
        self._losses: dict[str, tuple[float, float]] = {}  # of refined blocks
        self._left: list[str] = []  # compressed layers that were not refined

    def home(self, name: str) -> BlockPosition | None:
        """The block that a weight is refined with; None where there is none."""
        weight = self._study.places.get(name, "")
        place = self._study.home(weight)
        if place is None or len(self._tied[weight]) > 1 or weight == f"{self._study.block(place)}.weight":
            return None
        return place

    def refine(self, place: BlockPosition | None, fitted: Sequence[Fitted]) -> list[Fitted]:
        """The layers of a block with better cores, the first of them with norms that changed.

        Args:
            place: of the block; None of layers that have none.
            fitted: all its selected layers; the compressed network has them already.

        Returns:
            The layers, their records as they were, one of them with the losses of the block; cores of those
            that are dense, and of all where no state was better on held-out examples, as they were.
        """
        compressed = [one for one in fitted if one.cores]
        if place is None or not compressed:
            self._left += [one.record.layer for one in compressed]
            return list(fitted)
        path = self._study.block(place)
        self._study.context.log("refining block", len(self._losses) + 1, self._count)
        block, cores = self._with_cores(path, compressed)
        vectors = self._vectors(path, block, compressed)
        stored = {name: getattr(torch, one.record.stored_dtype) for name, one in cores.items()}
        stored |= {name: self._checkpoint.read(own).dtype for name, own in vectors.items()}
        seen, held_out = self._study.examples(self._compressed, place)
        seed = derived_seed(self._seed, "refine", path)
        found = refine_block(block, stored, seen, held_out, self._study.metric(place), seed)
        self._losses[path] = found.before, found.after
        if not found.tensors:
            return self._with_losses(path, fitted)
        changed = {own: found.tensors[name].cpu() for name, own in vectors.items()}
        new = {one.record.name: self._taken(one, path, found.tensors, changed) for one in compressed}
        first = compressed[0].record.name
        new[first] = replace(new[first], changed={**new[first].changed, **changed})
        return self._with_losses(path, [new.get(one.record.name, one) for one in fitted])

    def _with_losses(self, path: str, fitted: Sequence[Fitted]) -> list[Fitted]:
        first = next(one.record.name for one in fitted if one.cores)
        losses = {path: self._losses[path]}
        return [replace(one, losses=losses) if one.record.name == first else one for one in fitted]

    def take_up(self, place: BlockPosition | None, fitted: Sequence[Fitted]) -> None:
        """Layers of a block that an earlier run has refined; None of layers that have none."""
        self._left += [one.record.layer for one in fitted if one.cores and place is None]
        for one in fitted:
            self._losses |= one.losses

    @cached_property
    def _count(self) -> int:
        """Blocks that have a layer to refine, at most."""
        homes = {self.home(name) for group in self._study.groups for name in group}
        return len(homes - {None})

    def taken_back(self, place: BlockPosition | None, fitted: Sequence[Fitted]) -> list[Fitted]:
        """The layers as they were: without the last refinement the network is nearer to the dense one."""
        path = self._study.block(place) if place is not None else ""
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
        """What came of it, in all, and which layers have no block."""
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
                f"not refined, in no block, in several or a block by themselves: {len(self._left)} layers "
                f"({names})"
            )
        return notes

    def _with_cores(self, path: str, fitted: Sequence[Fitted]) -> tuple[nn.Module, dict[str, Fitted]]:
        """A copy of a block, float32, computing through its cores; these by name, with their layers."""
        block = copy.deepcopy(self._compressed.get_submodule(path)).float()
        cores: dict[str, Fitted] = {}
        for one in fitted:
            place = self._within(path, one)
            own = [core.to(self._study.context.device, torch.float32, copy=True) for core in one.cores]
            adopt(block.get_submodule(place.rpartition(".")[0]), "weight", own, one.record.structure)
            cores |= {f"{core_prefix(place)}.{k}": one for k in range(len(own))}
        return block, cores

    def _within(self, path: str, fitted: Fitted) -> str:
        """The name of a weight within its block."""
        return self._study.places[fitted.record.name].removeprefix(f"{path}.")

    def _vectors(self, path: str, block: nn.Module, fitted: Sequence[Fitted]) -> dict[str, str]:
        """Biases of these layers and what norms hold: name in the block → in the checkpoint."""
        modules = {self._within(path, one).rpartition(".")[0] for one in fitted}
        found = {}
        for place, module in block.named_modules():
            if place in modules or "norm" in type(module).__name__.lower():
                for own, parameter in module.named_parameters(place, recurse=False):
                    name = f"{path}.{own}"
                    if parameter.dim() == 1 and len(self._tied.get(name, ())) == 1 and name in self._named:
                        found[own] = self._named[name]
        return found

    def _taken(
        self, fitted: Fitted, path: str, tensors: Mapping[str, Tensor], changed: Mapping[str, Tensor]
    ) -> Fitted:
        """A layer with new cores, and new values of the tensors that its fit had changed."""
        prefix = core_prefix(self._within(path, fitted))
        cores = [tensors[f"{prefix}.{k}"].cpu().contiguous() for k in range(len(fitted.cores))]
        own = {name: changed.get(name, tensor) for name, tensor in fitted.changed.items()}
        return replace(fitted, cores=cores, changed=own)
