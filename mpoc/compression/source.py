"""A checkpoint opened to be compressed: its layers are selected, and can be planned for one goal or many."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from mpoc.compression.plan import LayerPlan, at_fewest_bits, least_ratio, left_whole, make_plan
from mpoc.compression.recipe import Recipe
from mpoc.compression.run_context import RunContext
from mpoc.compression.selection import Selection, copies_by_name, select
from mpoc.compression.size_prediction import predict_weight_bytes
from mpoc.errors import MpocError, UsageError, excluding
from mpoc.io import hub_directory
from mpoc.io.checkpoint import Checkpoint
from mpoc.io.coded_parts import halved_names
from mpoc.io.keyed_store import Scratch
from mpoc.io.manifest import core_prefix
from mpoc.io.open_checkpoint import open_checkpoint
from mpoc.io.training_history import Measured
from mpoc.models.architecture import (
    traced_geometries,
    with_architecture,
    with_config,
    with_copies_tied,
    zoo_name,
)
from mpoc.models.auto_architecture import tell_architecture
from mpoc.runtime.device import memory
from mpoc.runtime.formatting import human_bytes
from mpoc.runtime.packages import is_packaged
from mpoc.tensor_networks.geometry import Geometry

if TYPE_CHECKING:
    from mpoc.compression.calibrate.calibration_data import CalibrationData, CalibrationRequest
    from mpoc.compression.calibrate.statistics import CalibrationStatistics

# A number of the network: it is held twice in float32, beside its layers' moments; and as much of that as
# files take
_BYTES_TO_CALIBRATE, _BYTES_IN_FILES = 20, 12


@dataclass(frozen=True)
class CompressionSource:
    """An open checkpoint with all that is decided before the goal: selection, recipe and geometries."""

    checkpoint: Checkpoint
    arch: str | None
    recipe: Recipe
    selection: Selection
    geometries: Mapping[str, Geometry]  # geometries of whole maps that a sample run traced
    request: CalibrationRequest | None = None  # None: layers are fitted to their weights alone
    data: CalibrationData | None = None  # None: not open yet
    why_not: str = ""  # calibration was tried, and given up

    @property
    def notes(self) -> list[str]:
        """Notes on the checkpoint for the user."""
        notes = [*self.checkpoint.notes, *self.selection.notes]
        if self.why_not:
            notes.append(f"not calibrated, fitted to the weights alone: {self.why_not}")
        if self.checkpoint.is_directory:
            notes += hub_directory.notes_on_files(self.checkpoint.path, self.checkpoint.weight_files)
        return notes

    def with_scores(self, measured: Measured) -> CompressionSource:
        """The same, with scores at their longest, for which the output leaves room."""
        return replace(self, checkpoint=replace(self.checkpoint, measured=measured))

    def plan(self, recipe: Recipe, refines: bool = False) -> list[LayerPlan]:
        """Plan every layer; ``recipe`` is that of the source with any goal.

        Args:
            recipe: the options.
            refines: the layers of each block are to be trained together.

        Raises:
            UsageError: as :func:`mpoc.compression.plan.make_plan`; or layers of few bits are to be trained.
            MpocError: a tensor has the name of a core.
        """
        checkpoint, selection = self.checkpoint, self.selection
        plans = make_plan(
            selection,
            recipe,
            lambda plans: predict_weight_bytes(checkpoint, selection, recipe, plans),
            self.geometries,
        )
        if refines:
            _refuse_refined_rounding(plans)
        _refuse_name_collisions(checkpoint, plans)
        return plans

    def budget_range(self) -> tuple[float, float, str]:
        """What a search may ask for: the smallest budget, that of the dense network, and its kind.

        A ``"size"`` is a share of the source's weight files, where layers are rounded; else a ``"ratio"``.
        """
        checkpoint, selection, recipe = self.checkpoint, self.selection, self.recipe
        plans = self.plan(recipe)
        if not any(plan.awaits_bits for plan in plans):
            return least_ratio(plans, recipe.allow_growth), 1.0, "ratio"
        least, dense = (
            predict_weight_bytes(checkpoint, selection, recipe, some) / checkpoint.nbytes_on_disk
            for some in (at_fewest_bits(plans), left_whole(plans))
        )
        return least, min(1.0, dense), "size"

    def statistics(self, request: CalibrationRequest, context: RunContext) -> CalibrationStatistics:
        """Measure the dense network on calibration data, whatever the goal."""
        from mpoc.compression.calibrate.calibration_data import open_calibration

        with context.group.all_or_raise():
            data = self.data or open_calibration(self.checkpoint.path, self.arch, request, self.recipe.seed)
        return self.statistics_of(data, request, context)

    def statistics_of(
        self, data: CalibrationData, request: CalibrationRequest, context: RunContext
    ) -> CalibrationStatistics:
        """The statistics of a network and data that are open."""
        from mpoc.compression.calibrate.statistics import CalibrationStatistics

        names = [map.name for map in self.selection.chosen]
        maps = dict.fromkeys(_whole_maps(self.selection, self.recipe), "a whole map")
        request = replace(request, effort=self.recipe.effort or request.effort)
        return CalibrationStatistics(data, request, names, context, self.recipe.seed, maps)


def open_source(source: Path, recipe: Recipe, arch: str | None, calibrated: bool) -> CompressionSource:
    """Open a checkpoint and select its layers.

    Args:
        source: file or directory.
        recipe: the options.
        arch: its network, as ``--arch`` names it; None: the one that its tensors tell, if they do.
        calibrated: whether it is to be fitted to data.

    Raises:
        UsageError: options that do not fit, or ``arch`` makes no network, or one with other tensors.
        MpocError: bad input.
    """
    checkpoint = open_checkpoint(source)
    told = tell_architecture(checkpoint, arch)
    arch = told.arch
    checkpoint = with_config(checkpoint) if arch is None else with_architecture(checkpoint, arch)
    checkpoint = replace(checkpoint, notes=[*checkpoint.notes, *([told.note] if told.note else ())])
    if checkpoint.kinds is None:
        checkpoint = with_copies_tied(checkpoint, copies_by_name(checkpoint))
    recipe = recipe.with_form(calibrated).with_bytes_of(checkpoint.nbytes_on_disk)
    selection = select(checkpoint, recipe.layers, recipe.exclude, bool(recipe.embeddings), recipe.min_params)
    maps = [m.name for m in selection.chosen if recipe.is_map(m.name, m.kind)]
    unsaid = [name for name in maps if not recipe.has_input_shape(name)]
    geometries = traced_geometries(arch, unsaid) if arch is not None else {}
    return CompressionSource(checkpoint, arch, recipe, with_halved(checkpoint, recipe, selection), geometries)


def calibrates_itself(recipe: Recipe, source: Path, arch: str | None) -> bool:
    """Whether self-made data are taken where none are given.

    A budget is asked for, nothing excludes data to share it by, and the zoo, an installed package or a
    directory's config.json names the network, and with it what it takes.
    """
    ordered = recipe.order or any(rule.order for rule in recipe.rules)
    bounded = any(rule.max_error is not None or rule.discard is not None for rule in recipe.rules)
    if not recipe.has_budget or ordered or bounded:
        return False
    if arch is None and source.is_file():
        arch = tell_architecture(open_checkpoint(source), None).arch
    return (
        (source / "config.json").is_file()
        if arch is None
        else zoo_name(arch) is not None or is_packaged(arch)
    )


def open_to_calibrate(
    source: Path, recipe: Recipe, arch: str | None, request: CalibrationRequest | None
) -> CompressionSource:
    """As :func:`open_source`, with the request; without it where it is optional and fails.

    Raises:
        UsageError: as :func:`open_source`.
        MpocError: bad input.
    """
    opened = open_source(source, recipe, arch, request is not None)
    if request is None or not request.optional:
        return replace(opened, request=request)
    from mpoc.compression.calibrate.calibration_data import open_calibration

    try:
        _refuse_to_fill_memory(opened.checkpoint, request.make_scratch())
        data = open_calibration(source, arch, request, recipe.seed)
    except MpocError as error:
        return replace(open_source(source, recipe, arch, False), why_not=str(error))
    return replace(opened, request=request, data=data)


def _refuse_to_fill_memory(checkpoint: Checkpoint, scratch: Scratch) -> None:
    numbers = sum(info.numel for info in checkpoint.infos.values())
    needed, free = numbers * _BYTES_TO_CALIBRATE, memory()[1]
    if scratch.has_room(numbers * _BYTES_IN_FILES):
        needed -= numbers * _BYTES_IN_FILES
    if free is not None and needed > free:
        said = f"it takes about {human_bytes(needed)} of memory, and {human_bytes(free)} are free"
        raise MpocError(said, "--calibrate self --scratch DIR")


def with_halved(checkpoint: Checkpoint, recipe: Recipe, selection: Selection) -> Selection:
    """The selection with the vectors that are written as float16, where any layer may become codes."""
    if all(recipe.storage_for(map.name)[0] == "float" for map in selection.chosen):
        return selection
    return replace(selection, halved=halved_names(checkpoint))


def _whole_maps(selection: Selection, recipe: Recipe) -> list[str]:
    """The convolutions that are compressed as whole maps."""
    maps = [map.name for map in selection.chosen if recipe.is_map(map.name, map.kind)]
    return [name for name in maps if not recipe.rule_for(name).dense]


def _refuse_name_collisions(checkpoint: Checkpoint, plans: list[LayerPlan]) -> None:
    for plan in plans:
        prefix = core_prefix(plan.map.name) + "."
        taken = next((name for name in checkpoint.infos if name.startswith(prefix)), None)
        if taken and not plan.is_dense:
            raise MpocError(
                f"{checkpoint.path}: tensor {taken!r} has the name that a core of {plan.map.layer} would get",
                excluding(plan.map.layer),
            )


def _refuse_refined_rounding(plans: list[LayerPlan]) -> None:
    if rounded := next((plan for plan in plans if plan.rounding is not None), None):
        raise UsageError(
            f"--refine trains floats, but {rounded.map.layer} is rounded to few bits",
            "leave --refine out, or use --storage float",
        )
