"""Compress a network in memory: the same selection, plan and fit as for a file, then modules swapped."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from mpoc.compression.plain_fit import fit_layer
from mpoc.compression.plan import make_plan
from mpoc.compression.recipe import Recipe, make_recipe
from mpoc.compression.recipe_syntax import parse_shape
from mpoc.compression.selection import select
from mpoc.compression.size_prediction import make_manifest
from mpoc.errors import MpocError, UsageError, nearest
from mpoc.io.checkpoint import Checkpoint
from mpoc.io.manifest import Manifest
from mpoc.io.safetensors_header import TensorInfo
from mpoc.models.introspection import forbid_save_pretrained, kinds_of, same_tensor, trace_geometries
from mpoc.nn.adopt import adopt_everywhere
from mpoc.tensor_networks.factors import parse_order


@dataclass
class _Model(Checkpoint):
    """A network's state as a checkpoint."""

    @property
    def is_directory(self) -> bool:
        return False

    @property
    def nbytes_on_disk(self) -> int:
        return sum(info.nbytes for info in self.infos.values())


def compress(model: nn.Module, **options: Any) -> Manifest:
    """Replace the linear maps of ``model`` by matrix product operators, in place.

        report = mpoc.compress(model, bond=4)
        print(report.rho)

    Args:
        model: on any device; kinds of layers are told from its modules.
        options: those of ``mpoc compress``, with underscores: exactly one of ``bond``, ``ratio``,
            ``max_error`` and ``discard`` (which ``bond`` may cap); ``layers``, ``exclude``, ``shape``,
            ``order`` (lists of strings), ``embeddings``, ``min_params``, ``allow_growth``, ``sites``,
            ``seed``; and for ``conv="map"`` the ``input_shape`` of one sample with its batch axis, as
            (1, 3, 32, 32).

    Returns:
        The report: ``rho``, ``rho_selected``, ``layers`` with factors, bonds and errors.

    Raises:
        MpocError: a weight that holds NaN, options that do not fit, nothing that would shrink. The model is
            unchanged then.
    """
    for key in options.keys() & {"size", "max_drop", "dtype", "device", "max_shard_size"}:
        raise UsageError(f"{key}: for files only; in memory a network keeps its device and dtype")
    sample = options.pop("input_shape", None)
    recipe = make_recipe(None, _recipe_options(options)).with_form(calibrated=False)
    checkpoint = _as_checkpoint(model)
    selection = select(checkpoint, recipe.layers, recipe.exclude, recipe.embeddings, recipe.min_params)
    if sample is not None and recipe.conv != "map":
        raise UsageError('input_shape is of use with conv="map" only')
    maps = [map.name for map in selection.chosen if recipe.is_map(map.name, map.kind)]
    geometries = trace_geometries(model, maps, sample) if maps else {}
    fitted = [
        fit_layer(checkpoint, plan, recipe, model.get_parameter(plan.map.name).device)
        for plan in make_plan(selection, recipe, geometries=geometries)
    ]
    if not any(fit.cores for fit in fitted):
        first = fitted[0].record
        raise MpocError(
            f"no layer would shrink, so nothing was changed ({first.layer}: {first.reason})",
            "a smaller bond, a larger max_error or discard, or allow_growth=True",
        )
    places = same_tensor(model)
    for fit in fitted:  # nothing is changed before every layer could be fitted
        name = fit.record.name
        if fit.cores:
            names = [name, *sorted(places[name] - {name})]
            adopt_everywhere(model, names, fit.cores, fit.record.structure)
    forbid_save_pretrained(model)
    return make_manifest(checkpoint, selection, recipe, [fit.record for fit in fitted])


def _recipe_options(options: dict[str, Any]) -> dict[str, Any]:
    """As the command line would give them; one pattern or shape need not be a list.

    Raises:
        UsageError: an option that there is not.
    """
    known = [field.name for field in fields(Recipe) if field.name != "rules"]
    for key in options:
        if key not in known:
            raise UsageError(f"unknown option {key!r}{nearest(key, known)}")
    several = {key: options[key] for key in ("layers", "exclude", "shape", "order") if key in options}
    lists = {key: (one,) if isinstance(one, str) else tuple(one) for key, one in several.items()}
    for key, parse in (("shape", parse_shape), ("order", parse_order)):
        if key in lists:
            lists[key] = tuple(map(parse, lists[key]))
    return options | lists


def _as_checkpoint(model: nn.Module) -> _Model:
    path = Path(f"<{type(model).__name__}>")
    state: dict[str, Tensor] = dict(model.named_parameters()) | dict(model.named_buffers())
    first = {id(tensor): name for name, tensor in reversed(state.items())}
    every = model.named_parameters(remove_duplicate=False)
    tied = {name: first[id(p)] for name, p in every if first[id(p)] != name}
    infos = {n: TensorInfo(n, str(t.dtype).removeprefix("torch."), tuple(t.shape)) for n, t in state.items()}
    return _Model(
        path,
        infos,
        tied,
        lambda name: state[name].detach(),
        dict.fromkeys(infos, path),
        kinds=kinds_of(model),
    )
