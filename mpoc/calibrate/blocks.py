"""Which layers of a network are refined block by block, with what else in the block, and what came of it."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from mpoc.calibrate.refine import refine
from mpoc.calibrate.study import Study
from mpoc.checkpoint import Checkpoint
from mpoc.fitting import Fitted, rounded
from mpoc.manifest import core_prefix
from mpoc.network import same_tensor
from mpoc.nn.adopt import adopt
from mpoc.train.settings import derived_seed

Place = tuple[int, int]  # chain, position


class Blocks:
    """The blocks of a network that is compressed layer by layer.

    Args:
        study: of the dense network and the calibration data.
        compressed: the network that gets the compressed weights as they are found.
        checkpoint: that is compressed.
        seed: of the order of the examples.
    """

    def __init__(self, study: Study, compressed: nn.Module, checkpoint: Checkpoint, seed: int) -> None:
        self._study, self._compressed, self._checkpoint, self._seed = study, compressed, checkpoint, seed
        self._tied = same_tensor(study.network)
        self._named = {place: name for name, place in study.places.items()}
        self._losses: dict[str, tuple[float, float]] = {}  # of refined blocks
        self._left: list[str] = []  # compressed layers that were not refined

    def home(self, name: str) -> Place | None:
        """The block that a weight is refined with; None where there is none."""
        weight = self._study.places.get(name, "")
        place = self._study.home(weight)
        if place is None or len(self._tied[weight]) > 1 or weight == f"{self._study.block(place)}.weight":
            return None
        return place

    def refine(self, place: Place | None, fitted: Sequence[Fitted]) -> list[Fitted]:
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
        if self._study.tell:
            self._study.tell("refining block", len(self._losses) + 1, self._count)
        block, cores = self._with_cores(path, compressed)
        vectors = self._vectors(path, block, compressed)
        stored = {name: getattr(torch, one.record.stored_dtype) for name, one in cores.items()}
        stored |= {name: self._checkpoint.read(own).dtype for name, own in vectors.items()}
        seen, held_out = self._study.examples(self._compressed, place)
        seed = derived_seed(self._seed, "refine", path)
        found = refine(block, stored, seen, held_out, self._study.metric(place), seed)
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

    def take_up(self, place: Place | None, fitted: Sequence[Fitted]) -> None:
        """Layers of a block that an earlier run has refined; None of layers that have none."""
        self._left += [one.record.layer for one in fitted if one.cores and place is None]
        for one in fitted:
            self._losses |= one.losses

    @cached_property
    def _count(self) -> int:
        """Blocks that have a layer to refine, at most."""
        homes = {self.home(name) for group in self._study.groups for name in group}
        return len(homes - {None})

    def taken_back(self, place: Place | None, fitted: Sequence[Fitted]) -> list[Fitted]:
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
                f"not refined, as in no block or in several, or a block alone: {len(self._left)} layers "
                f"({names})"
            )
        return notes

    def _with_cores(self, path: str, fitted: Sequence[Fitted]) -> tuple[nn.Module, dict[str, Fitted]]:
        """A copy of a block, float32, computing through its cores; these by name, with their layers."""
        block = copy.deepcopy(self._compressed.get_submodule(path)).float()
        cores: dict[str, Fitted] = {}
        for one in fitted:
            place = self._within(path, one)
            own = [core.to(self._study.device, torch.float32, copy=True) for core in one.cores]
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
