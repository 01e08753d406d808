"""``mpoc compress``: a checkpoint in, cores and a ρ report out."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mpoc.cli.compress_options import (
    HOW,
    OUT,
    AllowGrowth,
    Arch,
    Bond,
    Calibrate,
    CalibrationSamples,
    Embeddings,
    EvalData,
    Exclude,
    Layers,
    MaxError,
    MinParams,
    Ratio,
    Size,
)
from mpoc.cli.console import Output, reported_errors
from mpoc.errors import UsageError

if TYPE_CHECKING:
    from mpoc.calibrate.study import CalibrationRequest
    from mpoc.pipeline import Compression
    from mpoc.train.measure import Measured


def compress(
    model: Annotated[
        Path,
        typer.Argument(
            metavar="MODEL",
            help="Checkpoint: .pt .pth .th .bin .ckpt .safetensors, or a Hugging Face directory.",
        ),
    ],
    bond: Bond = None,
    ratio: Ratio = None,
    max_error: MaxError = None,
    size: Size = None,
    layers: Layers = None,
    exclude: Exclude = None,
    embeddings: Embeddings = None,
    min_params: MinParams = None,
    allow_growth: AllowGrowth = None,
    form: Annotated[
        str | None,
        typer.Option(
            metavar="mpo|svd|auto",
            help="mpo: a chain of sites. svd: two factors, outputs × D and D × inputs. auto: for each layer "
            "the best, with --calibrate and --ratio, where it is the default.",
            rich_help_panel=HOW,
        ),
    ] = None,
    sites: Annotated[
        int | None,
        typer.Option(
            help="Sites a layer, besides a kernel's taps. Default: 4, from 1,024 wide 5.",
            rich_help_panel=HOW,
        ),
    ] = None,
    shape: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[PATTERN=]INPUTS:OUTPUTS",
            help="Factors, as fc1=4x7x7x4:4x4x4x4. Repeatable.",
            rich_help_panel=HOW,
        ),
    ] = None,
    conv: Annotated[
        str | None,
        typer.Option(
            metavar="kernel|map",
            help="What of a convolution is factorised: its kernel (default), or the whole linear map "
            "at one input size, which ties the layer to that size.",
            rich_help_panel=HOW,
        ),
    ] = None,
    input_shape: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[PATTERN=]HxW[:stride=1,padding=1,dilation=1,groups=1,padding_mode=zeros]",
            help="For --conv map: the layer's input size and, as no checkpoint has them, its settings. "
            "Default padding: dilation·(k-1)/2. Repeatable.",
            rich_help_panel=HOW,
        ),
    ] = None,
    arch: Arch = None,
    eval_data: EvalData = None,
    calibrate: Calibrate = None,
    calibration_samples: CalibrationSamples = None,
    recipe: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="TOML file: these options, and tables for single layers.",
            rich_help_panel=HOW,
        ),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="Of the stored cores: float32, bfloat16, … Default: each weight's own.",
            rich_help_panel=HOW,
        ),
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="auto, cpu, cuda, cuda:1, …", rich_help_panel=HOW)
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of the randomised SVD.", rich_help_panel=HOW)] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="OUT",
            help="Default: MODEL.mpo.safetensors or MODEL-mpo/ in the current directory.",
            rich_help_panel=OUT,
        ),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Replace an existing output.", rich_help_panel=OUT)
    ] = False,
    max_shard_size: Annotated[
        str | None,
        typer.Option(help="Largest weight file of a directory. Default: 5GB.", rich_help_panel=OUT),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Print the plan, write nothing.", rich_help_panel=OUT),
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="The report as JSON on stdout.", rich_help_panel=OUT)
    ] = False,
    quiet: Annotated[
        bool, typer.Option("--quiet", help="No progress on stderr.", rich_help_panel=OUT)
    ] = False,
    verbose: Annotated[
        bool,
        typer.Option("--verbose", help="Name every weight left alone, with the reason.", rich_help_panel=OUT),
    ] = False,
) -> None:
    """Compress a checkpoint: each chosen linear map becomes a matrix product operator.

    Examples:

    mpoc compress resnet56.th --bond 8

    mpoc compress bert/ --ratio 0.5 --exclude 'pooler*'

    mpoc compress fc2.pt --arch fc2 --ratio 0.5 --calibrate mnist/

    mpoc compress vgg.pt --size 20MB --dry-run

    mpoc compress vgg.pt --bond 4 --layers 'conv*' --conv map --input-shape 'conv*=2x2'
    """
    options = {
        key: tuple(value) if isinstance(value, list) else value
        for key, value in locals().items()
        if key not in _NOT_IN_RECIPE
    }
    from mpoc.cli.compress_output import print_json, print_table

    with reported_errors():
        words = Output(quiet, verbose)
        if eval_data is not None and dry_run:
            raise UsageError("--eval measures what was written, and --dry-run writes nothing")
        calibration = _calibration(calibrate, calibration_samples)
        before = _measure(model, eval_data, arch, device, words)
        done = _run(model, output, recipe, options, force, dry_run, arch, calibration, words)
        after = _measure(done.output, eval_data, arch, device, words)
        if as_json:
            print_json(done, before, after)
        else:
            print_table(done, before, after, words)
        if done.written:
            words.say(f"wrote {done.output}")
            words.next_command(f"mpoc report {done.output}")


_NOT_IN_RECIPE = (
    "model",
    "output",
    "recipe",
    "force",
    "dry_run",
    "arch",
    "eval_data",
    "calibrate",
    "calibration_samples",
    "as_json",
    "quiet",
    "verbose",
)


def _calibration(data: Path | None, samples: int | None) -> CalibrationRequest | None:
    if data is None:
        if samples is not None:
            raise UsageError("--calibration-samples is of use with --calibrate only", "--calibrate DATA")
        return None
    from mpoc.calibrate.study import CalibrationRequest

    return CalibrationRequest(data) if samples is None else CalibrationRequest(data, samples)


def _run(
    model: Path,
    output: Path | None,
    recipe_file: Path | None,
    options: dict[str, Any],
    force: bool,
    dry_run: bool,
    arch: str | None,
    calibration: CalibrationRequest | None,
    words: Output,
) -> Compression:
    from mpoc.cli.progress import layer_progress
    from mpoc.input_shape import parse_input_shape
    from mpoc.option_text import parse_shape, parse_size
    from mpoc.pipeline import choose_device, compress_checkpoint, default_output
    from mpoc.recipe import make_recipe

    if options["shape"] is not None:
        options["shape"] = tuple(parse_shape(text) for text in options["shape"])
    if options["input_shape"] is not None:
        options["input_shape"] = tuple(parse_input_shape(text) for text in options["input_shape"])
    for key in ("size", "max_shard_size"):
        if options[key] is not None:
            options[key] = parse_size(options[key])
    recipe = make_recipe(recipe_file, options)
    words.say(f"device {choose_device(recipe.device)}")
    target = output or default_output(model)
    if calibration is not None:
        words.say(f"calibrating on {calibration.data}: first the dense network, then layer by layer")
    with layer_progress(words) as progress:
        done = compress_checkpoint(model, target, recipe, force, dry_run, progress, arch, calibration)
    for note in done.notes:
        words.say(f"note: {note}")
    return done


def _measure(
    path: Path, data: Path | None, arch: str | None, device: str | None, words: Output
) -> Measured | None:
    """The network's scores on the data of ``--eval``; said in words once, before."""
    if data is None:
        return None
    from mpoc.train.material import DataOptions
    from mpoc.train.measure import MeasureRequest, measure

    words.say(f"measuring {path}")
    return measure(MeasureRequest(path, DataOptions(data), arch=arch, device=device or "auto"))
