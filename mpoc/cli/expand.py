"""``mpoc expand``: a dense checkpoint again."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mpoc.cli.console import Output, reported_errors

if TYPE_CHECKING:
    from mpoc.io.manifest import LayerRecord


def expand(
    path: Annotated[Path, typer.Argument(metavar="OUT", help="A compressed file or directory.")],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="DENSE", help="Where to write the dense checkpoint."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing output.")] = False,
    max_shard_size: Annotated[str, typer.Option(help="Largest weight file of a directory, as 5GB.")] = "5GB",
    project: Annotated[
        bool,
        typer.Option(
            "--project",
            help="Of a convolution compressed as one map (--conv map), write the nearest kernel.",
        ),
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Errors only.")] = False,
) -> None:
    """Write dense weights under their original names, shapes and dtypes, so that anything can load them.

    Example: mpoc expand resnet56.mpo.safetensors -o resnet56.safetensors
    """
    with reported_errors():
        from mpoc.compression.expand import default_dense_output, expand_checkpoint
        from mpoc.compression.recipe_syntax import parse_size
        from mpoc.io.weight_files import output_bytes
        from mpoc.runtime.formatting import human_bytes

        def say_projected(layer: LayerRecord, error: float) -> None:
            words.say(f"{layer.layer}: nearest kernel, {error:.4g} of the map's norm away")

        words = Output(quiet)
        target = output or default_dense_output(path)
        size, projected = parse_size(max_shard_size), say_projected if project else None
        manifest = expand_checkpoint(path, target, force, size, projected)
        words.say(
            f"wrote {target}: {len(manifest.replaced)} layers dense again, "
            f"{human_bytes(output_bytes(target))}"
        )
        loader = "AutoModel.from_pretrained" if target.is_dir() else "safetensors.torch.load_file"
        words.next_command(f"{loader}({str(target)!r}) in Python")
