"""``mpoc compress``: a checkpoint in, cores and a ρ report out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mpoc.cli.compress_options import (
    HOW,
    OUT,
    AllowGrowth,
    Arch,
    Bond,
    Calibrate,
    CalibrationSamples,
    Conv,
    Discard,
    Embeddings,
    EvalData,
    Exclude,
    Form,
    InputShapes,
    Layers,
    MaxDrop,
    MaxError,
    MinParams,
    Moments,
    Orders,
    Plot,
    Ratio,
    Refine,
    Resume,
    Shape,
    Sites,
    Size,
)
from mpoc.cli.compress_request import compress_request
from mpoc.cli.console import Output, reported_errors


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
    discard: Discard = None,
    size: Size = None,
    max_drop: MaxDrop = None,
    layers: Layers = None,
    exclude: Exclude = None,
    embeddings: Embeddings = None,
    min_params: MinParams = None,
    allow_growth: AllowGrowth = None,
    form: Form = None,
    sites: Sites = None,
    shape: Shape = None,
    order: Orders = None,
    conv: Conv = None,
    input_shape: InputShapes = None,
    arch: Arch = None,
    eval_data: EvalData = None,
    plot: Plot = None,
    calibrate: Calibrate = None,
    calibration_samples: CalibrationSamples = None,
    refine: Refine = False,
    moments: Moments = None,
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
    resume: Resume = False,
    max_shard_size: Annotated[
        str | None,
        typer.Option(help="Largest weight file of a directory. Default: 5GB.", rich_help_panel=OUT),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Print the plan, write no output.", rich_help_panel=OUT),
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

    mpoc compress fc2.pt --arch fc2 --max-drop 1 --eval mnist/ -o small.safetensors

    mpoc compress vgg.pt --size 20MB --dry-run

    mpoc compress vgg.pt --bond 4 --layers 'conv*' --conv map --input-shape 'conv*=2x2'
    """
    values = dict(locals())
    from mpoc.cli.compress_output import print_json, print_table
    from mpoc.cli.compress_run import run

    with reported_errors():
        words = Output(quiet, verbose)
        request = compress_request(values)
        found = run(request, words)
        if words.silent:
            return
        if as_json:
            print_json(found)
        else:
            print_table(found, words)
        if found.done.written:
            words.say(f"wrote {found.done.output}")
            words.next_command(f"mpoc report {found.done.output}")
