"""The options that say which data, shared by ``finetune``, ``eval`` and ``compress --eval``."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mpoc.errors import UsageError

if TYPE_CHECKING:
    from mpoc.train.training_data import DataOptions


DATA = "Data"

DataPath = Annotated[
    Path,
    typer.Option(
        "--data",
        metavar="PATH",
        help="A file or folder: image folder, MNIST IDX, CIFAR binary, .npz, .safetensors, .parquet, "
        ".jsonl, .txt.",
        rich_help_panel=DATA,
    ),
]
Format = Annotated[
    str | None, typer.Option(help="Of the data, where it is not recognised.", rich_help_panel=DATA)
]
Mean = Annotated[
    str | None,
    typer.Option(
        metavar="M[,M,M]",
        help="Of the pixels of each channel, from 0 to 1. Default: as recorded, else 0.",
        rich_help_panel=DATA,
    ),
]
Std = Annotated[
    str | None,
    typer.Option(
        metavar="S[,S,S]",
        help="What they are divided by. Default: as recorded, else 1.",
        rich_help_panel=DATA,
    ),
]
ImageSize = Annotated[
    str | None, typer.Option("--size", metavar="HxW", help="Resize images to this.", rich_help_panel=DATA)
]
Tokenizer = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR",
        help="Of text: a Hugging Face directory. Default: the model's own, else single characters.",
        rich_help_panel=DATA,
    ),
]
Block = Annotated[
    int | None,
    typer.Option(
        help="Tokens of an example. Default: the network's context, at most 256.", rich_help_panel=DATA
    ),
]
Column = Annotated[
    str | None, typer.Option(help="Of a table with several text columns.", rich_help_panel=DATA)
]
HoldOut = Annotated[
    float | None,
    typer.Option(
        "--hold-out",
        help="Share of the training split that is held out for validation; 0: none. Default: 0.1 where the "
        "data have no split to measure on; in eval what the network's training on this set held out.",
        rich_help_panel=DATA,
    ),
]


def data_options(path: Path, values: dict[str, Any]) -> DataOptions:
    """The options of a command as plain data.

    Args:
        path: of the data.
        values: by the names of ``DataOptions``, as the command line gave them; others are passed over.

    Raises:
        UsageError: a value that cannot be read.
    """
    from mpoc.train.training_data import DataOptions

    given: dict[str, Any] = {
        name: values[name]
        for name in ("format", "pad", "flip", "tokenizer", "block", "column", "held_out")
        if values.get(name) is not None
    }
    for name in ("mean", "std"):
        if values.get(name) is not None:
            given[name] = _numbers(f"--{name}", values[name])
    if values.get("size") is not None:
        given["size"] = _size(values["size"])
    return DataOptions(path, **given)


def _numbers(option: str, text: str) -> tuple[float, ...]:
    try:
        return tuple(map(float, text.split(",")))
    except ValueError as error:
        raise UsageError(f"{option} {text}: not numbers with commas between, as 0.5,0.5,0.5") from error


def _size(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"([1-9]\d{0,4})(?:x([1-9]\d{0,4}))?", text)
    if not found:
        raise UsageError(f"--size {text[:40]}: not a height and a width, as 32x32")
    return int(found[1]), int(found[2] or found[1])
