"""The options of ``mpoc compress`` that say how far, which layers, and on what data."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

GOAL = "How far (exactly one; --bond may cap --discard)"
WHICH = "Which layers"
HOW = "How"
OUT = "Output"


Bond = Annotated[int | None, typer.Option(help="Cap on every bond dimension D.", rich_help_panel=GOAL)]
Discard = Annotated[
    float | None,
    typer.Option(
        metavar="ε",
        help="Each bond as small as its own spectrum allows: the Schmidt values cut hold at most this share "
        "of Σs². --bond caps it.",
        rich_help_panel=GOAL,
    ),
]
Size = Annotated[
    str | None,
    typer.Option(help="Ceiling on the whole output, as 20MB.", rich_help_panel=GOAL),
]
MaxDrop = Annotated[
    float | None,
    typer.Option(
        metavar="X",
        help="The smallest output found that loses at most X of the metric on the data of --eval: points of "
        "accuracy in per cent, or a rise of the loss; without labels or head, of the likeness to the "
        "original (agreement in per cent, else cosine). Tries up to 8 ratios.",
        rich_help_panel=GOAL,
    ),
]
Layers = Annotated[
    list[str] | None,
    typer.Option(
        metavar="PATTERN",
        help="Only these: a glob, or re: and a regular expression. Repeatable.",
        rich_help_panel=WHICH,
    ),
]
Exclude = Annotated[
    list[str] | None,
    typer.Option(metavar="PATTERN", help="Not these. Repeatable.", rich_help_panel=WHICH),
]
Embeddings = Annotated[
    bool | None,
    typer.Option("--embeddings/--no-embeddings", help="Embeddings too.", rich_help_panel=WHICH),
]
MinParams = Annotated[
    int | None,
    typer.Option(help="Leave weights with fewer parameters alone.", rich_help_panel=WHICH),
]
AllowGrowth = Annotated[
    bool | None,
    typer.Option(
        "--allow-growth/--no-allow-growth",
        help="Factorise layers even where the cores are larger than the weight.",
        rich_help_panel=WHICH,
    ),
]
Form = Annotated[
    str | None,
    typer.Option(
        metavar="mpo|svd|tree|mera|svd+mpo|auto",
        help="mpo: a chain of sites. svd: two factors, outputs × D and D × inputs. tree: the sites in a "
        "binary tree. mera: the tree with disentanglers. svd+mpo: a sum. "
        "auto: for each layer the best. The last two with --calibrate and a budget (--ratio, --size or "
        "--max-drop), where auto is the default.",
        rich_help_panel=HOW,
    ),
]
Sites = Annotated[
    int | None,
    typer.Option(
        help="Sites a layer, besides a kernel's taps. Default: 4, from 1,024 wide 5.",
        rich_help_panel=HOW,
    ),
]
Shape = Annotated[
    list[str] | None,
    typer.Option(
        metavar="[PATTERN=]INPUTS:OUTPUTS",
        help="Factors, as fc1=4x7x7x4:4x4x4x4. Repeatable.",
        rich_help_panel=HOW,
    ),
]
Orders = Annotated[
    list[str] | None,
    typer.Option(
        metavar="[PATTERN=]raster|morton:[Cx]HxW|learned",
        help="In which order a linear layer's inputs are factorised: as they are; an image's by blocks, "
        "coarse to fine, as fc1=morton:28x28; or one learnt from the weight. Undone on load. Repeatable.",
        rich_help_panel=HOW,
    ),
]
Conv = Annotated[
    str | None,
    typer.Option(
        metavar="kernel|map",
        help="What of a convolution is factorised: its kernel (default), or the whole linear map "
        "at one input size, which ties the layer to that size.",
        rich_help_panel=HOW,
    ),
]
InputShapes = Annotated[
    list[str] | None,
    typer.Option(
        metavar="[PATTERN=]HxW[:stride=1,padding=1,dilation=1,groups=1,padding_mode=zeros]",
        help="For --conv map: the layer's input size and, as no checkpoint has them, its settings. "
        "Default padding: dilation·(k-1)/2. Repeatable.",
        rich_help_panel=HOW,
    ),
]
Arch = Annotated[
    str | None,
    typer.Option(
        metavar="NETWORK",
        help="Whose tensors these are: a network of the zoo, as resnet:depth=56, or "
        "package.module:factory or file.py:factory, which is run. Tells kinds of layers; is recorded.",
        rich_help_panel=WHICH,
    ),
]
EvalData = Annotated[
    Path | None,
    typer.Option(
        "--eval",
        metavar="DATA",
        help="Measure before and after on these data, as mpoc eval does, or where there are no labels the "
        "likeness to the original; a file needs --arch.",
        rich_help_panel=OUT,
    ),
]
Plot = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="With --max-drop, draw size against metric: .png, .svg or .pdf.",
        rich_help_panel=OUT,
    ),
]
Calibrate = Annotated[
    Path | None,
    typer.Option(
        metavar="DATA",
        help="Fit what the layers do on these data, not their weights: inputs like those the network "
        "will see, no labels needed. A file needs --arch.",
        rich_help_panel=HOW,
    ),
]
CalibrationSamples = Annotated[
    int | None,
    typer.Option(help="How many of their examples at most. Default: 512.", rich_help_panel=HOW),
]
Moments = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="With --calibrate: keep what is measured of the dense network in FILE, and read it from there "
        "where it is of the same weights, data and options. --dry-run keeps it too.",
        rich_help_panel=HOW,
    ),
]
Refine = Annotated[
    bool,
    typer.Option(
        "--refine",
        help="With --calibrate: train each block's compressed layers together to give what the dense block "
        "gives.",
        rich_help_panel=HOW,
    ),
]
Resume = Annotated[
    bool,
    typer.Option(
        "--resume",
        help="Keep finished layers in OUT.partial until the output is whole; the same command goes on from "
        "there after an interruption.",
        rich_help_panel=OUT,
    ),
]


def _share(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise typer.BadParameter(f"{text!r} is not a number; 50 % is 0.5") from None


Ratio = Annotated[
    float | None,
    typer.Option(
        parser=_share,
        metavar="FLOAT",
        help="Ceiling on ρ over all selected layers, those left dense included.",
        rich_help_panel=GOAL,
    ),
]
MaxError = Annotated[
    float | None,
    typer.Option(
        parser=_share,
        metavar="FLOAT",
        help="Small bonds that keep each layer's relative error.",
        rich_help_panel=GOAL,
    ),
]
