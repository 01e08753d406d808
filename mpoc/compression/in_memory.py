"""Compress a network in memory, with the selection, plan and fit of a file, and then swap its modules."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mpoc.compression.calibrate.calibration_data import CalibrationRequest, calibrate_on, named_data
from mpoc.compression.calibrate.layer_inputs import device_of
from mpoc.compression.calibrate.taps import removing_taps
from mpoc.compression.plain_fit import Fitted, fit_layer
from mpoc.compression.plan import LayerPlan
from mpoc.compression.recipe import GOALS, Recipe, check_recipe, make_recipe
from mpoc.compression.recipe_syntax import CONV_FORMS, parse_budget, parse_shape, parse_share
from mpoc.compression.run_context import RunContext
from mpoc.compression.selection import select
from mpoc.compression.size_prediction import halved_beside
from mpoc.compression.source import CompressionSource, with_halved
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
from mpoc.tensor_networks.factors import LEARNED, parse_order
from mpoc.tensor_networks.forms import FORMS

# Options of a recipe that are for files: in memory a network keeps its device and dtype.
_FOR_FILES = ("max_drop", "dtype", "device", "max_shard_size")
# An option in a message, with its value if one follows.
_NAMES = "|".join(map(re.escape, sorted((*FORMS, "auto", *CONV_FORMS, LEARNED), reverse=True)))
_OPTION = re.compile(rf"--([a-z][a-z-]*)(?: (?:('[^']*'|-?\d[\d.e-]*\b)|({_NAMES})(?![\w'])))?")


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
    ratio: float | str | None = None,
    size: int | float | str | None = None,
    bits: int | None = None,
    storage: str | None = None,
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
    effort: str | None = None,
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

    Every weight is factorised by TT-SVD (Oseledets 2011; Eq. 5 of Gao et al. 2020), or in the given form. The
    modules' classes say what kinds of layers there are. Exactly one goal is needed, here or in the recipe:
    ``bond``, ``max_error``, ``discard`` (which ``bond`` may cap), ``ratio``, ``size``, or ``bits`` alone.

    Args:
        model: the network, on any device, with floating-point weights. Its modules stay the same objects, but
            their class and their parameters change.
        bond: largest bond dimension D of every layer.
        max_error: largest relative error ‖W − Ŵ‖ / ‖W‖ of every layer, between 0 and 1.
        discard: largest share of the squared Schmidt values that each bond may lose, between 0 and 1.
        ratio: largest ρ, parameters stored over parameters before, of all selected layers together; 0.25 or
            ``"25%"``.
        size: size limit of the file that :func:`mpoc.save` writes: bytes, ``"20MB"``, or ``"25%"`` of what
            the tensors take now.
        bits: bits of a number that is stored: 2, 3, 4, 5, 6 or 8. Alone it is a goal, and every layer stays
            dense. Weights take the values that they are rounded to; :func:`mpoc.save` writes their codes.
        storage: ``"grid"`` (the default with ``bits``), ``"coded"`` or ``"float"``.
        recipe: a :class:`mpoc.Recipe`, or a TOML file with one. Arguments override it.
        form: ``"mpo"`` (the default), ``"svd"``, ``"tree"`` or ``"mera"``.
        layers: glob patterns, or regular expressions after ``re:``; only matching layers are compressed.
        exclude: patterns of the same kind; matching layers are left alone.
        embeddings: compress embeddings too; by default where ``size`` is met by rounding all layers.
        min_params: leave weights with fewer entries alone.
        allow_growth: factorise a layer even if its cores are larger than its weight.
        sites: number of sites per layer, not counting a kernel's taps.
        shape: factors, as ``"fc1=4x7x7x4:4x4x4x4"`` (inputs:outputs).
        order: order in which the inputs of linear layers are factorised, as ``"fc1=morton:28x28"``.
        conv: factorise a convolution's ``"kernel"`` (the default) or its whole ``"map"``.
        input_shape: shape of one input with its batch axis, as (1, 3, 32, 32); needed for ``conv="map"``.
        seed: seed of the randomised range finder and of the draw of calibration examples.
        calibrate: data to fit the layers' outputs on: batches, as a ``DataLoader`` or a list of tensors, of
            tuples that begin with the input, or of dicts as transformers takes them; or the path of a data
            set; or ``"self"``, for data made for the network. The network runs in eval mode.
        calibration_samples: number of examples to draw, 512 if omitted. From an iterable without random
            access, the first ones are taken.
        effort: forms that calibrated layers choose among: ``"fast"`` (two factors), ``"balanced"`` (the
            default) or ``"thorough"``; requires ``calibrate``.
        refine: train the layers of each block together after the fit; requires ``calibrate``.

    Returns:
        The report: ρ, and the form, factors, bonds and error of every selected layer.

    Raises:
        UsageError: an argument is out of range, arguments exclude each other, or a pattern matches no layer.
        MpocError: a weight is not finite, or no layer would shrink.
            After either error the model is unchanged.
    """
    with _naming_arguments():
        given = {
            "bond": bond,
            "max_error": max_error,
            "discard": discard,
            "ratio": parse_share(ratio) if isinstance(ratio, str) else ratio,
            "size": None if size is None else parse_budget(size),
            "bits": bits,
            "storage": storage,
            "form": form,
            "effort": effort,
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
        chosen = chosen.with_bytes_of(_bytes_of(model))
        sample = None if input_shape is None else tuple(input_shape)
        job, fitted, changed = _fit(model, chosen, sample, request)
    records = [fit.record for fit in fitted]
    manifest = job.manifest(records)
    _swap(model, fitted, changed, halved_beside(job.source.selection, chosen, records))
    codes = {fit.record.name: fit.entries for fit in fitted if fit.codes}
    tensors = {name: {entry.info.name: entry.read() for entry in entries} for name, entries in codes.items()}
    remember(model, manifest, tensors)
    return Report(manifest, saved_bytes(*describe(model)))


@contextmanager
def _naming_arguments() -> Iterator[None]:
    """Name the arguments of :func:`compress` in errors, in place of the command line's options."""
    try:
        yield
    except MpocError as error:
        hint = error.hint and _as_arguments(error.hint)
        raise type(error)(_as_arguments(str(error)), hint) from error.__cause__


def _as_arguments(text: str) -> str:
    """``"--max-error 0.5"`` → ``"max_error=0.5"``; a command line becomes a call."""
    command, found, options = text.partition("mpoc compress MODEL ")
    if found and not command:
        return f"mpoc.compress(model, {_as_arguments(options)})"

    def argument(match: re.Match[str]) -> str:
        name, value, word = match[1].replace("-", "_"), match[2], match[3]
        return name if value is word is None else f"{name}={value or repr(word)}"

    return _OPTION.sub(argument, text)


def _texts(value: str | Iterable[str] | None, parse: Callable[[str], Any] = str) -> tuple[Any, ...] | None:
    """Parse one text or several."""
    if value is None:
        return None
    return tuple(map(parse, (value,) if isinstance(value, str) else value))


def _merged(recipe: Recipe | str | PathLike[str] | None, given: Mapping[str, Any]) -> Recipe:
    """The recipe, overridden by the given options, and checked.

    Raises:
        UsageError: a value is out of range, there is not exactly one goal, or an option is for files only.
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
            raise UsageError(f"{key} is for files only: in memory, a network keeps its device and dtype")
    return merged


def _bytes_of(model: nn.Module) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())


def _calibration_request(
    data: Iterable[Any] | str | PathLike[str] | None, samples: int | None, refine: bool
) -> CalibrationRequest | None:
    if data is None:
        if refine or samples is not None:
            raise UsageError(f"{'refine' if refine else 'calibration_samples'} requires calibrate")
        return None
    data = named_data(data) if isinstance(data, str | PathLike) else data
    return CalibrationRequest(data, CalibrationRequest.samples if samples is None else samples, refine)


def _fit(
    model: nn.Module, recipe: Recipe, sample: tuple[int, ...] | None, request: CalibrationRequest | None
) -> tuple[Job, list[Fitted], dict[str, Tensor]]:
    """Fit all selected layers without changing the network.

    Args:
        model: the network, with floating-point weights.
        recipe: the options, with a form.
        sample: shape of one input, for whole maps.
        request: the data to fit to; None: fit to the weights alone.

    Returns:
        The job, the fitted layers, and new values of tensors that belong to no single layer.

    Raises:
        MpocError: a weight cannot be fitted, or no layer would shrink.
    """
    source = _source(model, recipe, sample)
    changed: dict[str, Tensor] = {}
    if request is None:
        job = make_job(source, recipe, source.plan(recipe), RunContext(device_of(model)))
        fitted = [_fit_layer(model, job, plan) for plan in job.plans]
    else:
        with evaluating(model), removing_taps(model):
            job = _calibrated_job(model, source, request)
            layers = {fit.record.name: fit for fit in job.fits()}
            fitted, changed = [layers[plan.map.name] for plan in job.plans], job.finish()
    if not any(fit.record.is_changed for fit in fitted):
        first = fitted[0].record
        raise MpocError(
            f"no layer would shrink, so nothing was changed ({first.layer}: {first.reason})",
            "a smaller bond, a larger max_error or discard, or allow_growth=True",
        )
    return job, fitted, changed


def _source(model: nn.Module, recipe: Recipe, sample: tuple[int, ...] | None) -> CompressionSource:
    """The tensors of a network as a source, with its selected layers."""
    if recipe.size is not None and any(compressed_weights(model)):
        raise UsageError("size: the network has compressed layers already", "ratio or bond")
    checkpoint = _as_checkpoint(model)
    selection = select(checkpoint, recipe.layers, recipe.exclude, bool(recipe.embeddings), recipe.min_params)
    if sample is not None and recipe.conv != "map":
        raise UsageError('input_shape requires conv="map"')
    maps = [map.name for map in selection.chosen if recipe.is_map(map.name, map.kind)]
    geometries = trace_geometries(model, maps, sample) if maps else {}
    return CompressionSource(checkpoint, None, recipe, with_halved(checkpoint, recipe, selection), geometries)


def _fit_layer(model: nn.Module, job: Job, plan: LayerPlan) -> Fitted:
    """Fit a layer to its weight alone, on the weight's device."""
    device = model.get_parameter(plan.map.name).device
    return fit_layer(job.source.checkpoint, plan, job.recipe, device)


def _calibrated_job(model: nn.Module, source: CompressionSource, request: CalibrationRequest) -> Job:
    """Prepare the fit to the layers' outputs on calibration data.

    Args:
        model: the network in eval mode. If it has half precision, a float32 copy runs.
        source: its tensors, with the selected layers.
        request: the data.
    """
    plans = source.plan(source.recipe, request.refine)
    if len({parameter.device for parameter in model.parameters()}) > 1:
        raise UsageError("calibrate: the network is on several devices", "model.to(device)")
    halves = any(p.dtype in (torch.float16, torch.bfloat16) for p in model.parameters())
    network = copy.deepcopy(model).float() if halves else model
    checkpoint, recipe, context = source.checkpoint, source.recipe, RunContext(device_of(model))
    places = {name: name for name in [*checkpoint.infos, *checkpoint.tied]}
    path = Path(getattr(model, "name_or_path", None) or checkpoint.path)  # transformers records its origin
    data = calibrate_on(Model(path, network, checkpoint, None, None, places), request, recipe.seed)
    statistics = source.statistics_of(data, request, context)
    return make_job(source, recipe, plans, context, statistics)


@torch.no_grad()
def _swap(model: nn.Module, fitted: list[Fitted], changed: dict[str, Tensor], halved: Iterable[str]) -> None:
    """Replace the fitted weights by cores, set what else the fit changed, and round vectors to float16."""
    state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for name, tensor in [*(pair for fit in fitted for pair in fit.changed.items()), *changed.items()]:
        state[name].copy_(tensor)
    for name in halved:
        half = state[name].half()
        state[name].copy_(half if bool(half.isfinite().all()) else state[name])
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
    if hasattr(
        model, "save_pretrained"
    ):  # in the order of its files, so that the first of tied layers is the same
        infos = storage_order(infos)
    return _Model(
        path,
        {info.name: info for info in infos},
        tied,
        lambda name: state[name].detach(),
        {info.name: path for info in infos},
        kinds=kinds_of(model),
    )
