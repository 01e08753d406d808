"""``mpoc export``: the compressed network as a program for other runtimes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mpoc.cli.console import Output, reported_errors


def export(
    path: Annotated[Path, typer.Argument(metavar="OUT", help="A compressed file or directory.")],
    onnx: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write ONNX, for onnxruntime and others.")
    ] = None,
    pt2: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write a program for torch.export.load.")
    ] = None,
    arch: Annotated[
        str | None,
        typer.Option(
            metavar="NETWORK",
            help="The dense network: package.module:factory or file.py:factory, or one of the zoo. Not "
            "needed for a Hugging Face directory, nor for a file that names a network of the zoo itself.",
        ),
    ] = None,
    input_shape: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SHAPE[:DTYPE]",
            help="Of an input with its batch, as 1x3x32x32 or 1x128:int64. Repeatable, in order. "
            "Default: what a network of the zoo takes.",
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace existing files.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Errors only.")] = False,
) -> None:
    """Write the compressed network as a program that runs without mpoc; the batch size stays free.

    --arch runs the code that it names.

    Examples:

    mpoc export resnet56.mpo.safetensors --arch resnet.py:resnet56 --input-shape 1x3x32x32 --onnx net.onnx

    mpoc export resnet56.mpo.safetensors --arch resnet.py:resnet56 --input-shape 1x3x32x32 --pt2 net.pt2
    """
    with reported_errors():
        from mpoc.io.weight_files import output_bytes
        from mpoc.models.export import export_network, parse_input_spec
        from mpoc.runtime.formatting import human_bytes

        files = {kind: file for kind, file in (("onnx", onnx), ("pt2", pt2)) if file is not None}
        shapes = [parse_input_spec(text) for text in input_shape or []]
        inputs = export_network(path, files, shapes, arch, force)
        words = Output(quiet)
        taken = ", ".join(f"{spec} {str(spec.dtype).removeprefix('torch.')}" for spec in inputs)
        for file in files.values():
            words.say(f"wrote {file}: {human_bytes(output_bytes(file))}, inputs {taken}")
