"""``mpoc export``: write the compressed network as a program for other runtimes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mpoc.cli.console import Output
from mpoc.cli.options import takes
from mpoc.runtime.formatting import human_bytes
from mpoc.runtime.options import argument, option
from mpoc.train.settings import architecture_option


@dataclass(frozen=True)
class ExportOptions:
    """The command line of ``mpoc export``."""

    path: Path = argument("OUT", "A compressed file or directory.")
    onnx: Path | None = option("Write ONNX, for onnxruntime and others.", None, metavar="FILE")
    pt2: Path | None = option("Write a program for torch.export.load.", None, metavar="FILE")
    arch: str | None = architecture_option(panel=None)
    input_shape: tuple[str, ...] = option(
        "Give an input's shape with its batch, as 1x3x32x32 or 1x128:int64. Repeatable.",
        (), metavar="SHAPE[:DTYPE]", repeated=True,
    )  # fmt: skip
    force: bool = option("Replace existing files.", False)
    quiet: bool = option("Print errors only.", False)


@takes(ExportOptions)
def export(options: ExportOptions) -> None:
    """Write the compressed network as a program that runs without mpoc; the batch size stays free.

    --arch file.py:function runs that code; the zoo and Hugging Face directories need none.

    Examples:

    mpoc export resnet56.mpo.safetensors --arch resnet.py:resnet56 --input-shape 1x3x32x32 --onnx net.onnx

    mpoc export resnet56.mpo.safetensors --arch resnet.py:resnet56 --input-shape 1x3x32x32 --pt2 net.pt2
    """
    from mpoc.io.weight_files import output_bytes
    from mpoc.models.export import export_network, parse_input_spec

    files = {kind: file for kind, file in (("onnx", options.onnx), ("pt2", options.pt2)) if file is not None}
    shapes = [parse_input_spec(text) for text in options.input_shape]
    inputs = export_network(options.path, files, shapes, options.arch, options.force)
    console = Output(options.quiet)
    taken = ", ".join(f"{spec} {str(spec.dtype).removeprefix('torch.')}" for spec in inputs)
    for file in files.values():
        console.say(f"wrote {file}: {human_bytes(output_bytes(file))}, inputs {taken}")
