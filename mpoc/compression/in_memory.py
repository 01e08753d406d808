"""Compress a network in memory: the same selection, plan and fit as for a file, then modules are swapped."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mpoc.compression.calibrate.calibration_data import CalibrationRequest, calibrate_on
from mpoc.compression.calibrate.layer_inputs import device_of
from mpoc.compression.plain_fit import Fitted, fit_layer
from mpoc.compression.plan import LayerPlan
from mpoc.compression.recipe import GOALS, Recipe, check_recipe, make_recipe
from mpoc.compression.recipe_syntax import parse_shape
from mpoc.compression.run_context import RunContext
from mpoc.compression.selection import select
from mpoc.compression.source import CompressionSource
from mpoc.compression.write import Job, make_job
from mpoc.errors import MpocError, UsageError
from mpoc.io.checkpoint import Checkpoint
from mpoc.io.safetensors_header import TensorInfo, storage_order
from mpoc.models.introspection import (
    evaluating,
    forbid_save_pretrained,
    kinds_of,
    same_tensor,
    tensors_of,
    trace_geometries,
)
from mpoc.models.loading import Model
from mpoc.models.saving import describe, remember, saved_bytes
from mpoc.nn.adopt import adopt_everywhere, compressed_weights
from mpoc.reporting.summary import Report
from mpoc.runtime.formatting import parse_size
from mpoc.tensor_networks.factors import parse_order

# Options of a recipe that are for files: in memory a network keeps its device and dtype.
_FOR_FILES = ("max_drop", "dtype", "device", "max_shard_size")


@dataclass
class _Model(Checkpoint):
    """A network's state as a checkpoint."""

    @property
    def is_directory(self) -> bool:
        return False

    @property
    def nbytes_on_disk(self) -> int:
        return sum(info.nbytes for info in self.infos.values())


def compress(
    model: nn.Module,
    *,
    bond: int | None = None,
    max_error: float | None = None,
    discard: float | None = None,
    ratio: float | None = None,
    size: int | str | None = None,
    recipe: Recipe | str | PathLike[str] | None = None,
    form: str | None = None,
    layers: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] | None = None,
    embeddings: bool | None = None,
    min_params: int | None = None,
    allow_growth: bool | None = None,
    sites: int | None = None,
    shape: str | Iterable[str] | None = None,
    order: str | Iterable[str] | None = None,
    conv: str | None = None,
    input_shape: Sequence[int] | None = None,
    seed: int | None = None,
    calibrate: Iterable[Any] | str | PathLike[str] | None = None,
    calibration_samples: int | None = None,
    refine: bool = False,
) -> Report:
    """Replace linear maps of a network by tensor networks, in place.

        >>> network = nn.Sequential(nn.Linear(784, 300), nn.ReLU(), nn.Linear(300, 10))
        >>> report = mpoc.compress(network, bond=4)
        >>> [layer.bonds for layer in report.layers]
        [(1, 4, 4, 4, 1), (1, 4, 1)]
        >>> report.num_parameters == sum(p.numel() for p in network.parameters())
        True
        >>> network(torch.rand(5, 784)).shape
        torch.Size([5, 10])

    Every weight is factorised by TT-SVD (Oseledets 2011; Eq. 5 of Gao et al. 2020), or in the form that is
    asked for. Kinds of layers are told from the modules. Exactly one goal is needed, here or in the recipe:
    ``bond``, ``max_error``, ``discard`` (which ``bond`` may cap), ``ratio`` or ``size``.

    Args:
        model: on any device, with floating-point weights. Its modules stay the same objects; their class and
            their parameters change.
        bond: largest bond dimension D of every layer.
        max_error: largest relative error ‖W − Ŵ‖ / ‖W‖ of every layer, between 0 and 1.
        discard: largest share of the squared Schmidt values that each bond may lose, between 0 and 1.
        ratio: largest ρ, parameters stored over parameters before, of all selected layers together.
        size: largest file that :func:`mpoc.save` may write of the network: bytes, or text as ``"20MB"``.
        recipe: a :class:`mpoc.Recipe`, or a TOML file with one. Options given beside it win.
        form: ``"mpo"`` (the default), ``"svd"``, ``"tree"`` or ``"mera"``.
        layers: glob patterns, or ``re:`` and a regular expression; only layers that match are compressed.
        exclude: patterns of the same kind; layers that match are left alone.
        embeddings: compress embeddings too.
        min_params: leave weights with fewer entries alone.
        allow_growth: factorise a layer even where its cores are larger than its weight.
        sites: number of sites of each layer, a kernel's taps not counted.
        shape: factors, as ``"fc1=4x7x7x4:4x4x4x4"`` (inputs:outputs).
        order: order in which inputs of linear layers are factorised, as ``"fc1=morton:28x28"``.
        conv: what of a convolution is factorised: its ``"kernel"`` (the default) or the whole ``"map"``.
        input_shape: of one input with its batch axis, as (1, 3, 32, 32); needed for ``conv="map"``.
        seed: of the randomised range finder, and of the draw of calibration examples.
        calibrate: data to fit what the layers do, beside their weights: batches, as a ``DataLoader`` or a
            list of tensors, of tuples that begin with the input, or of dicts as transformers takes them; or
            the path of a data set. The network runs in evaluation mode.
        calibration_samples: number of examples to draw, 512 if omitted. Of an iterable without random access
            the first ones are taken.
        refine: train the layers of each block together after the fit; requires ``calibrate``.

    Returns:
        The report: ρ, and of every selected layer its form, factors, bonds and error.

    Raises:
        UsageError: options that are out of range, do not fit together or match no layer.
        MpocError: a weight that is not finite, or no layer that would shrink.
            After either error the model is unchanged.
    """
    given = {
        "bond": bond,
        "max_error": max_error,
        "discard": discard,
        "ratio": ratio,
        "size": None if size is None else parse_size(size),
        "form": form,
        "layers": _texts(layers),
        "exclude": _texts(exclude),
        "embeddings": embeddings,
        "min_params": min_params,
        "allow_growth": allow_growth,
        "sites": sites,
        "shape": _texts(shape, parse_shape),
        "order": _texts(order, parse_order),
        "conv": conv,
        "seed": seed,
    }
    request = _calibration_request(calibrate, calibration_samples, refine)
    chosen = _merged(recipe, given).with_form(calibrated=request is not None)
    sample = None if input_shape is None else tuple(input_shape)
    job, fitted, changed = _fit(model, chosen, sample, request)
    manifest = job.manifest([fit.record for fit in fitted])
    _swap(model, fitted, changed)
    remember(model, manifest)
    return Report(manifest, saved_bytes(*describe(model)))


def _texts(value: str | Iterable[str] | None, parse: Callable[[str], Any] = str) -> tuple[Any, ...] | None:
    """One text or several, parsed."""
    if value is None:
        return None
    return tuple(map(parse, (value,) if isinstance(value, str) else value))


def _merged(recipe: Recipe | str | PathLike[str] | None, given: Mapping[str, Any]) -> Recipe:
    """The recipe with the options that are given, which win, checked.

    Raises:
        UsageError: values out of range, no goal or several, or options that are for files only.
    """
    if isinstance(recipe, Recipe):
        options = {key: value for key, value in given.items() if value is not None}
        if any(goal in options for goal in GOALS):
            options = dict.fromkeys(GOALS) | options
        merged = replace(recipe, **options)
        check_recipe(merged)
    else:
        merged = make_recipe(None if recipe is None else Path(recipe), given)
    defaults = {field.name: field.default for field in fields(Recipe)}
    for key in _FOR_FILES:
        if getattr(merged, key) != defaults[key]:
            raise UsageError(f"{key}: for files only; in memory a network keeps its device and dtype")
    return merged


def _calibration_request(
    data: Iterable[Any] | str | PathLike[str] | None, samples: int | None, refine: bool
) -> CalibrationRequest | None:
    if data is None:
        if refine or samples is not None:
            raise UsageError(f"{'refine' if refine else 'calibration_samples'} requires calibrate")
        return None
    data = Path(data) if isinstance(data, str | PathLike) else data
    return CalibrationRequest(data, CalibrationRequest.samples if samples is None else samples, refine)


def _fit(
    model: nn.Module, recipe: Recipe, sample: tuple[int, ...] | None, request: CalibrationRequest | None
) -> tuple[Job, list[Fitted], dict[str, Tensor]]:
    """Fit all selected layers; nothing is changed yet.

    Args:
        model: with floating-point weights.
        recipe: with the form that a fit with or without data takes.
        sample: shape of one input, for whole maps.
        request: the data to fit to; None: weights alone count.

    Returns:
        What was planned, the layers, and new values of tensors that belong to no single layer.

    Raises:
        MpocError: a weight that cannot be fitted, or no layer that would shrink.
    """
    source = _source(model, recipe, sample)
    changed: dict[str, Tensor] = {}
    if request is None:
        job = make_job(source, recipe, source.plan(recipe), RunContext(device_of(model)))
        fitted = [_fit_layer(model, job, plan) for plan in job.plans]
    else:
        with evaluating(model):
            job = _calibrated_job(model, source, request)
            layers = {fit.record.name: fit for fit in job.fits()}
            fitted, changed = [layers[plan.map.name] for plan in job.plans], job.finish()
    if not any(fit.cores for fit in fitted):
        first = fitted[0].record
        raise MpocError(
            f"no layer would shrink, so nothing was changed ({first.layer}: {first.reason})",
            "a smaller bond, a larger max_error or discard, or allow_growth=True",
        )
    return job, fitted, changed


def _source(model: nn.Module, recipe: Recipe, sample: tuple[int, ...] | None) -> CompressionSource:
    """The tensors of a network as a source, with the layers that are selected."""
    if recipe.size is not None and any(compressed_weights(model)):
        raise UsageError("size: the network has compressed layers already", "ratio or bond")
    checkpoint = _as_checkpoint(model)
    selection = select(checkpoint, recipe.layers, recipe.exclude, recipe.embeddings, recipe.min_params)
    if sample is not None and recipe.conv != "map":
        raise UsageError('input_shape is of use with conv="map" only')
    maps = [map.name for map in selection.chosen if recipe.is_map(map.name, map.kind)]
    geometries = trace_geometries(model, maps, sample) if maps else {}
    return CompressionSource(checkpoint, None, recipe, selection, geometries)


def _fit_layer(model: nn.Module, job: Job, plan: LayerPlan) -> Fitted:
    """Fitted to its weight alone, on the device where that is."""
    device = model.get_parameter(plan.map.name).device
    return fit_layer(job.source.checkpoint, plan, job.recipe, device)


def _calibrated_job(model: nn.Module, source: CompressionSource, request: CalibrationRequest) -> Job:
    """The fit to what the layers do on calibration data.

    Args:
        model: in evaluation mode; where it is of half precision, a copy in float32 is measured.
        source: its tensors, and the layers that are selected.
        request: the data.
    """
    if len({parameter.device for parameter in model.parameters()}) > 1:
        raise UsageError("calibrate: the network is on several devices", "model.to(device)")
    halves = any(p.dtype in (torch.float16, torch.bfloat16) for p in model.parameters())
    network = copy.deepcopy(model).float() if halves else model
    checkpoint, recipe, context = source.checkpoint, source.recipe, RunContext(device_of(model))
    places = {name: name for name in [*checkpoint.infos, *checkpoint.tied]}
    path = Path(getattr(model, "name_or_path", None) or checkpoint.path)  # transformers says where it is from
    data = calibrate_on(Model(path, network, checkpoint, None, None, places), request, recipe.seed)
    statistics = source.statistics_of(data, request, context)
    return make_job(source, recipe, source.plan(recipe), context, statistics)


@torch.no_grad()
def _swap(model: nn.Module, fitted: list[Fitted], changed: dict[str, Tensor]) -> None:
    """Put cores in the place of the weights that were fitted, and new values into what goes with them."""
    state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for name, tensor in [*(pair for fit in fitted for pair in fit.changed.items()), *changed.items()]:
        state[name].copy_(tensor)
    places = same_tensor(model)
    for fit in fitted:
        name = fit.record.name
        if fit.cores:
            names = [name, *sorted(places[name] - {name})]
            adopt_everywhere(model, names, fit.cores, fit.record.structure)
    forbid_save_pretrained(model)


def _as_checkpoint(model: nn.Module) -> _Model:
    """The network's state dict, each distinct tensor once."""
    path = Path(f"<{type(model).__name__}>")
    state: dict[str, Tensor] = tensors_of(model, keep_vars=True)
    firsts: dict[int, str] = {}
    for name, tensor in state.items():
        firsts.setdefault(id(tensor), name)
    tied = {name: firsts[id(tensor)] for name, tensor in state.items() if firsts[id(tensor)] != name}
    infos = [
        TensorInfo(name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))
        for name, tensor in state.items()
        if name not in tied
    ]
    if hasattr(model, "save_pretrained"):  # in the order of its files: the first of equal layers is the same
        infos = storage_order(infos)
    return _Model(
        path,
        {info.name: info for info in infos},
        tied,
        lambda name: state[name].detach(),
        {info.name: path for info in infos},
        kinds=kinds_of(model),
    )
