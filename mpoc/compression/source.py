"""A checkpoint opened to be compressed: its layers are chosen; it can be planned for one goal or for many."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from mpoc.compression.plan import LayerPlan, make_plan
from mpoc.compression.recipe import Recipe
from mpoc.compression.selection import Selection, select
from mpoc.compression.size_prediction import predict_size
from mpoc.errors import MpocError
from mpoc.io import hub_directory
from mpoc.io.checkpoint import Checkpoint
from mpoc.io.manifest import core_prefix
from mpoc.io.open_checkpoint import open_checkpoint
from mpoc.models.architecture import traced_geometries, with_architecture
from mpoc.runtime.distributed import SINGLE_PROCESS, ProcessGroup
from mpoc.tensor_networks.geometry import Geometry

if TYPE_CHECKING:
    from mpoc.compression.calibrate.dense_pass import StageCallback
    from mpoc.compression.calibrate.statistics import CalibrationRequest, CalibrationStatistics


@dataclass(frozen=True)
class CompressionSource:
    """A checkpoint with all that is decided before its goal."""

    checkpoint: Checkpoint
    arch: str | None
    recipe: Recipe
    device: torch.device
    selection: Selection
    geometries: Mapping[str, Geometry]  # of whole maps, where a sample run told

    @property
    def notes(self) -> list[str]:
        """What should be said of the checkpoint."""
        notes = [*self.checkpoint.notes, *self.selection.notes]
        if self.checkpoint.is_directory:
            notes += hub_directory.left_behind(self.checkpoint.path, self.checkpoint.weight_files)
        return notes

    def plan(self, recipe: Recipe) -> list[LayerPlan]:
        """Form and bonds of every layer; ``recipe`` is this one with any goal.

        Raises:
            UsageError: as :func:`mpoc.compression.plan.make_plan`.
            MpocError: a tensor has the name of a core.
        """
        checkpoint, selection = self.checkpoint, self.selection
        plans = make_plan(
            selection,
            recipe,
            lambda plans: predict_size(checkpoint, selection, recipe, plans),
            self.geometries,
        )
        _refuse_name_collisions(checkpoint, plans)
        return plans

    def study(
        self,
        request: CalibrationRequest,
        tell: StageCallback | None = None,
        group: ProcessGroup = SINGLE_PROCESS,
    ) -> CalibrationStatistics:
        """The dense network on calibration data, whatever the goal; ``tell`` is told as work goes on."""
        from mpoc.compression.calibrate.statistics import CalibrationStatistics

        names = [map.name for map in self.selection.chosen]
        maps = dict.fromkeys(_whole_maps(self.selection, self.recipe), "a whole map")
        seed, path = self.recipe.seed, self.checkpoint.path
        return CalibrationStatistics(path, self.arch, request, names, seed, self.device, maps, tell, group)


def open_source(
    source: Path, recipe: Recipe, arch: str | None, calibrated: bool, device: torch.device
) -> CompressionSource:
    """Open a checkpoint and choose its layers.

    Args:
        source: file or directory.
        recipe: as asked.
        arch: its network, as ``--arch`` names it.
        calibrated: whether it is to be fitted to data.
        device: to compute on.

    Raises:
        UsageError: options that do not fit, or ``arch`` makes no network, or one with other tensors.
        MpocError: bad input.
    """
    checkpoint = open_checkpoint(source)
    if arch is not None:
        checkpoint = with_architecture(checkpoint, arch)
    recipe = recipe.with_form(calibrated)
    selection = select(checkpoint, recipe.layers, recipe.exclude, recipe.embeddings, recipe.min_params)
    maps = [m.name for m in selection.chosen if recipe.is_map(m.name, m.kind)]
    unsaid = [name for name in maps if not recipe.has_input_shape(name)]
    geometries = traced_geometries(arch, unsaid) if arch is not None else {}
    return CompressionSource(checkpoint, arch, recipe, device, selection, geometries)


def _whole_maps(selection: Selection, recipe: Recipe) -> list[str]:
    """Convolutions that are compressed as whole maps."""
    maps = [map.name for map in selection.chosen if recipe.is_map(map.name, map.kind)]
    return [name for name in maps if not recipe.rule_for(name).dense]


def _refuse_name_collisions(checkpoint: Checkpoint, plans: list[LayerPlan]) -> None:
    for plan in plans:
        prefix = core_prefix(plan.map.name) + "."
        taken = next((name for name in checkpoint.infos if name.startswith(prefix)), None)
        if taken and not plan.is_dense:
            raise MpocError(
                f"{checkpoint.path}: tensor {taken!r} has the name that a core of {plan.map.layer} would get",
                f"--exclude '{plan.map.layer}'",
            )
