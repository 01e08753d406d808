"""The command line of ``mpoc compress`` as plain data, checked before any work."""

from __future__ import annotations

import os
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpoc.errors import MpocError, UsageError

if TYPE_CHECKING:
    from mpoc.calibrate.study import CalibrationRequest
    from mpoc.recipe import Recipe


@dataclass(frozen=True)
class CompressRequest:
    """What is asked for."""

    model: Path
    output: Path
    recipe: Recipe
    force: bool
    dry_run: bool
    arch: str | None
    calibration: CalibrationRequest | None
    eval_data: Path | None
    plot: Path | None
    resume: bool


def compress_request(values: dict[str, Any]) -> CompressRequest:
    """The options of ``mpoc compress`` as plain data.

    Args:
        values: by the names of the command's parameters.

    Raises:
        UsageError: a value that cannot be read, options that do not go together, no such data, or an output,
            picture or file of moments that may not be written.
        MpocError: the directory of one of them is not there, or matplotlib is not.
    """
    from mpoc.pipeline import default_output, refuse_output

    request = CompressRequest(
        values["model"],
        values["output"] or default_output(values["model"]),
        _recipe(values),
        values["force"],
        values["dry_run"],
        values["arch"],
        _calibration(values),
        values["eval_data"],
        values["plot"],
        values["resume"],
    )
    _refuse_what_does_not_go_together(request)
    _refuse_moments(request)
    if request.eval_data is not None:
        refuse_output(request.model, request.output, request.force)
        _refuse_missing(request.eval_data)
        if request.calibration is not None:
            _refuse_missing(request.calibration.data)
    return request


def _recipe(values: dict[str, Any]) -> Recipe:
    from mpoc.recipe import make_recipe

    return make_recipe(values["recipe"], recipe_options(values))


def recipe_options(values: dict[str, Any]) -> dict[str, Any]:
    """Those of a command's parameters that are fields of a recipe, read.

    Raises:
        UsageError: a shape or a size that is none.
    """
    from mpoc.input_shape import parse_input_shape
    from mpoc.option_text import parse_shape, parse_size
    from mpoc.orders import parse_order
    from mpoc.recipe import Recipe

    options = {f.name: values[f.name] for f in fields(Recipe) if f.name in values}
    readers = {"shape": parse_shape, "input_shape": parse_input_shape, "order": parse_order}
    for key, value in options.items():
        if isinstance(value, list):
            options[key] = tuple(map(readers[key], value)) if key in readers else tuple(value)
        elif key in ("size", "max_shard_size") and value is not None:
            options[key] = parse_size(value)
    return options


def _calibration(values: dict[str, Any]) -> CalibrationRequest | None:
    if values["calibrate"] is None:
        for name in ("calibration_samples", "refine", "moments"):
            if values[name]:
                option = f"--{name.replace('_', '-')}"
                raise UsageError(f"{option} is of use with --calibrate only", "--calibrate DATA")
        return None
    from mpoc.calibrate.study import CalibrationRequest

    request = CalibrationRequest(values["calibrate"], refine=values["refine"], moments=values["moments"])
    samples = values["calibration_samples"]
    return request if samples is None else replace(request, samples=samples)


def _refuse_what_does_not_go_together(request: CompressRequest) -> None:
    searches = request.recipe.max_drop is not None
    if request.dry_run and (searches or request.eval_data is not None):
        option = "--max-drop" if searches else "--eval"
        raise UsageError(f"{option} measures what was written, and --dry-run writes nothing")
    if searches and request.eval_data is None:
        raise UsageError("--max-drop is of a metric, so it needs data to measure it on", "--eval DATA")
    if request.resume and (searches or request.dry_run):
        why = "--max-drop writes several" if searches else "--dry-run fits nothing that could be kept"
        raise UsageError(f"--resume keeps the finished layers of one output, and {why}")
    if request.plot is not None:
        if not searches:
            raise UsageError("--plot draws what --max-drop finds, and it is not given", "--max-drop 1")
        from mpoc.train.curves import refuse_unknown_picture

        refuse_unknown_picture(request.plot)


def _refuse_moments(request: CompressRequest) -> None:
    """A file to keep moments in must have a place of its own."""
    path = None if request.calibration is None else request.calibration.moments
    if request.calibration is None or path is None:
        return
    here = path.resolve()
    for other in (request.model, request.output, request.calibration.data, request.eval_data, request.plot):
        if other is not None and other.resolve() in (here, *here.parents):
            raise UsageError(f"--moments {path}: is in the place of {other}, or in it", "name another FILE")
    if here.exists() and not here.is_file():
        raise UsageError(f"--moments {path}: is not a file", "name another FILE")
    if not here.parent.is_dir():
        raise MpocError(f"--moments {path}: there is no directory {here.parent}", f"mkdir -p {here.parent}")
    if not here.exists() and not os.access(here.parent, os.W_OK | os.X_OK):
        raise MpocError(f"--moments {path}: no permission to write in {here.parent}")


def _refuse_missing(data: Path) -> None:
    from mpoc.data.files import recognise

    recognise(data, None)
