"""``mpoc export``: write the compressed network as a program for other runtimes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mpoc.cli.console import Output
from mpoc.cli.options import takes
from mpoc.errors import MpocError, UsageError
from mpoc.runtime.formatting import counted, human_bytes
from mpoc.runtime.options import argument, option
from mpoc.train.settings import architecture_option


@dataclass(frozen=True)
class ExportOptions:
    """The command line of ``mpoc export``."""

    path: Path = argument("OUT", "A compressed file or directory.")
    onnx: Path | None = option("Write ONNX, for onnxruntime and others.", None, metavar="FILE")
    pt2: Path | None = option("Write a program for torch.export.load.", None, metavar="FILE")
    hf: Path | None = option("Write a directory for transformers without mpoc.", None, metavar="DIR")
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

    --hf writes pairs of linear layers for svd, packed integers for a grid, and dense weights for the rest.

    --arch file.py:function runs that code; the zoo and Hugging Face directories need none.

    Examples:

    mpoc export resnet56.mpo.safetensors --arch resnet.py:resnet56 --input-shape 1x3x32x32 --onnx net.onnx

    mpoc export resnet56.mpo.safetensors --arch resnet.py:resnet56 --input-shape 1x3x32x32 --pt2 net.pt2

    mpoc export bert-mpo/ --hf bert-transformers/
    """
    from mpoc.io.weight_files import output_bytes
    from mpoc.models.export import export_network, parse_input_spec

    files = {kind: file for kind, file in (("onnx", options.onnx), ("pt2", options.pt2)) if file is not None}
    shapes = [parse_input_spec(text) for text in options.input_shape]
    console = Output(options.quiet)
    if not files and options.hf is not None and (options.arch or shapes):
        raise UsageError("--arch and --input-shape apply to --onnx and --pt2, not to --hf")
    if options.hf is not None:
        _export_directory(console, options.path, options.hf, options.force)
        if not files:
            return
    inputs = export_network(options.path, files, shapes, options.arch, options.force)
    taken = ", ".join(f"{spec} {str(spec.dtype).removeprefix('torch.')}" for spec in inputs)
    for file in files.values():
        console.say(f"wrote {file}: {human_bytes(output_bytes(file))}, inputs {taken}")


def _export_directory(console: Output, source: Path, target: Path, force: bool) -> None:
    """Write the directory, and say what its layers became."""
    try:
        from mpoc.hf.export import export_directory
    except ImportError as error:  # transformers is missing, or too old
        raise MpocError(f"--hf: {error}", "pip install 'mpoc[hf]'") from error
    from mpoc.io.weight_files import output_bytes

    found = export_directory(source, target, force)
    size = human_bytes(output_bytes(target))
    console.say(
        f"wrote {target}: {size}; {counted(len(found.pairs), 'layer')} as pairs of linear layers, "
        f"{len(found.grids)} as codes of compressed-tensors, {len(found.dense)} dense"
    )
    code = ", trust_remote_code=True" if found.pairs else ""
    console.next_command(f"AutoModel.from_pretrained({str(target)!r}{code}) in Python")
