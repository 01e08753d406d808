"""The entanglement of a checkpoint's linear maps, of a compressed file's layers, or of both side by side."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from mpoc.compression.plan import LayerPlan
from mpoc.compression.recipe import make_recipe
from mpoc.compression.selection import check_pattern, matches
from mpoc.compression.source import open_source
from mpoc.errors import MpocError, UsageError, command_line
from mpoc.io.checkpoint import Checkpoint
from mpoc.io.manifest import LayerRecord
from mpoc.io.manifest_reader import read_manifest
from mpoc.io.open_checkpoint import check_cores, is_compressed, open_checkpoint, open_compressed, read_finite
from mpoc.tensor_networks.fit.spectra import Cut, cuts_of_cores, cuts_of_weight
from mpoc.tensor_networks.structure import Structure

SCHEMA = "mpoc.entanglement/1"
# What chooses layers; all other options choose factors, which a compressed file has.
_CHOOSING = ("layers", "exclude")


EntanglementProgress = Callable[[str, int, int], None]  # layer, its number from 1, layers in all


@dataclass(frozen=True)
class Profile:
    """A layer's cuts: of its weight, of what is stored of it, or of both."""

    layer: str
    name: str  # of the weight
    structure: Structure
    weight: tuple[Cut, ...] | None  # of the dense weight; None: not looked at
    stored: tuple[Cut, ...] | None = None  # of the compressed one
    record: LayerRecord | None = None  # of what is stored


@dataclass(frozen=True)
class Entanglement:
    """The profiles of all layers."""

    model: Path
    against: Path | None
    kept: float  # share of Σs² that effective bonds keep
    profiles: tuple[Profile, ...]
    left: int  # layers of a compressed file that it holds dense, and that are not here


def entanglement_of(
    model: Path,
    options: Mapping[str, Any],
    against: Path | None = None,
    kept: float = 0.99,
    arch: str | None = None,
    progress: EntanglementProgress | None = None,
) -> Entanglement:
    """Look at every chosen layer.

    Args:
        model: a dense checkpoint, or a compressed file or directory.
        options: a recipe's options for the choice of layers and their factors; None if not given.
        against: a compressed one of ``model``, whose factors are taken.
        kept: share of Σs² that effective bonds keep.
        arch: the network that ``model`` belongs to.
        progress: called before each layer.

    Raises:
        UsageError: options that do not fit together, or match nothing.
        MpocError: bad input, or ``against`` is of another model.
    """
    if not 0 < kept < 1:
        raise UsageError(f"--weight {kept}: the share of Σs² that is kept lies between 0 and 1")
    options = {key: value for key, value in options.items() if value is not None}
    if against is None and not is_compressed(model):
        measurements, left = _dense(model, options, kept, arch), 0
    else:
        measurements, left = _stored(model, against, options, kept, arch)
    profiles: list[Profile] = []
    for number, (layer, measure_layer) in enumerate(measurements.items(), start=1):
        if progress:
            progress(layer, number, len(measurements))
        profiles.append(measure_layer())
    return Entanglement(model, against, kept, tuple(profiles), left)


def _dense(
    model: Path, options: dict[str, Any], kept: float, arch: str | None
) -> dict[str, Callable[[], Profile]]:
    """A dense checkpoint's layers with the factors that ``mpoc compress`` would choose."""
    recipe = make_recipe(None, options | {"bond": 1, "allow_growth": True})
    opened = open_source(model, recipe, arch, False)

    plans = opened.plan(opened.recipe)
    learning = next((plan.map.layer for plan in plans if plan.learns_order), None)
    if learning is not None:
        raise UsageError(
            f"--order learned: what {learning} is truncated to decides it, and nothing is truncated here",
            f"{command_line('mpoc', 'compress', model, '--order', 'learned')}, then "
            + command_line("mpoc", "entanglement", model, "--against", "OUT"),
        )

    def look(plan: LayerPlan) -> Profile:
        weight = read_finite(opened.checkpoint, plan.map.name)
        cuts = tuple(cuts_of_weight(weight, plan.structure, kept))
        return Profile(plan.map.layer, plan.map.name, plan.structure, cuts)

    return {plan.map.layer: partial(look, plan) for plan in plans}


def _stored(
    model: Path, against: Path | None, options: dict[str, Any], kept: float, arch: str | None
) -> tuple[dict[str, Callable[[], Profile]], int]:
    """A compressed file's layers, with the weights they were where ``model`` is dense."""
    given = [key for key in options if key not in _CHOOSING] + ["arch"] * (arch is not None)
    if given:
        option = f"--{given[0].replace('_', '-')}"
        raise UsageError(f"{option}: the layers and their factors are those of the compressed file")
    path = model if against is None else against
    manifest = read_manifest(path)
    chosen = list(_matching(manifest.replaced, options))
    if not chosen:
        raise UsageError(f"{path}: no compressed layer is chosen", "--layers and --exclude decide")
    cores, dense = open_compressed(path, manifest), None if against is None else open_checkpoint(model)
    if dense is not None:
        _check_weights(dense, chosen, path)
    left = len(manifest.layers) - len(manifest.replaced)
    return {layer.layer: partial(_profile, layer, cores, dense, kept) for layer in chosen}, left


def _matching(layers: list[LayerRecord], options: dict[str, Any]) -> Iterator[LayerRecord]:
    names = [layer.name for layer in layers]
    for key in _CHOOSING:
        for pattern in options.get(key, ()):
            check_pattern(f"--{key}", pattern, names)
    wanted, unwanted = options.get("layers", ("*",)), options.get("exclude", ())
    for layer in layers:
        named = any(matches(pattern, layer.name) for pattern in wanted)
        if named and not any(matches(pattern, layer.name) for pattern in unwanted):
            yield layer


def _check_weights(dense: Checkpoint, layers: list[LayerRecord], against: Path) -> None:
    """Whether the layers of ``against`` are in the dense checkpoint, of the same shapes.

    Raises:
        MpocError: one is not.
    """
    for layer in layers:
        info = dense.infos.get(dense.tied.get(layer.name, layer.name))
        if info is None or info.shape != layer.shape:
            actual = "missing" if info is None else f"of shape {info.shape}"
            raise MpocError(
                f"{dense.path}: tensor {layer.name!r} is {actual}, but {layer.shape} in {against}",
                "give the checkpoint that it was compressed from",
            )


def _profile(layer: LayerRecord, stored: Checkpoint, dense: Checkpoint | None, kept: float) -> Profile:
    check_cores(stored, layer)
    cores = [read_finite(stored, name) for name in layer.core_names]
    weight: tuple[Cut, ...] | None = None
    if dense is not None:
        values = read_finite(dense, dense.tied.get(layer.name, layer.name))
        weight = tuple(cuts_of_weight(values, layer.structure, kept))
    cuts = tuple(cuts_of_cores(cores, layer.structure, kept))
    return Profile(layer.layer, layer.name, layer.structure, weight, cuts, layer)


def as_dict(entanglement: Entanglement) -> dict[str, Any]:
    """The JSON report, documented in the guide (file-format-and-json)."""
    return {
        "schema": SCHEMA,
        "model": str(entanglement.model),
        "against": None if entanglement.against is None else str(entanglement.against),
        "weight": entanglement.kept,
        "layers": [_layer_dict(profile) for profile in entanglement.profiles],
    }


def _layer_dict(profile: Profile) -> dict[str, Any]:
    structure = profile.structure
    return {
        "layer": profile.layer,
        "name": profile.name,
        "kind": structure.kind,
        "form": structure.form if profile.record is None else profile.record.form,
        "shape": structure.shape,
        "order": structure.order,
        "output_factors": structure.output_factors,
        "input_factors": structure.input_factors,
        "padding": structure.padding,
        "bonds": None if profile.record is None else profile.record.bonds,
        "low_rank": 0 if profile.record is None else profile.record.low_rank,
        "cuts": _cut_dicts(profile.weight),
        "cuts_stored": _cut_dicts(profile.stored),
    }


def _cut_dicts(cuts: tuple[Cut, ...] | None) -> list[dict[str, Any]] | None:
    if cuts is None:
        return None
    return [{**asdict(cut), "largest_entropy": cut.largest_entropy} for cut in cuts]
